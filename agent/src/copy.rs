//! Copies a sealed object from one location to another, byte for byte: the one way in which that is done.
//!
//! ```text
//! fetch   whole and checked, from the first location that has it so   ─► Whole
//! store   the wraps of its epoch first, then the object, create-once
//! replace the same where a damaged object lies under the name
//! ```
//!
//! What always holds: only bytes that pass their trailer, are what their name says, and agree with the manifest where there
//! is one, are stored; and no name gets two contents: what is deleted to make room for the object was no content of
//! any name. A crash leaves the object there, or absent where a damaged one was; never another.

use crate::writer::Writer;
use backstay_common::id::{EpochId, LocationName};
use backstay_common::location::{Location, Put};
use backstay_common::name::ObjectName;
use backstay_common::seal::Header;
use backstay_common::snapshot::PackEntry;
use backstay_common::{Context, Error, Kind, Result, pool};
use bytes::Bytes;

/// What a manifest says of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// In bytes.
    pub size: u64,
    /// Its trailer.
    pub hash: [u8; 32],
}

impl From<&PackEntry> for Expected {
    fn from(entry: &PackEntry) -> Expected {
        Expected { size: entry.size, hash: entry.hash }
    }
}

/// A whole object, checked.
#[derive(Clone, Debug)]
pub struct Whole {
    pub name: ObjectName,
    pub epoch: EpochId,
    pub bytes: Bytes,
}

/// What was wrong with the object at a location.
pub type Fault = (LocationName, Error);

/// Fetches `name` from the first of `sources`, which are in the order of preference, that has it whole. What was wrong
/// at those before is added to `faults`. Safe to drop.
pub async fn fetch(
    name: &ObjectName,
    sources: &[&Location],
    expected: Option<Expected>,
    faults: &mut Vec<Fault>,
) -> Result<Whole> {
    let first = faults.len();
    for source in sources {
        match read(source, name, expected).await {
            Ok(whole) => return Ok(whole),
            Err(error) => faults.push((source.name().clone(), error)),
        }
    }
    Err(nowhere(name, &faults[first..]))
}

/// Reads and checks the object at one location. Safe to drop.
pub async fn read(
    location: &Location,
    name: &ObjectName,
    expected: Option<Expected>,
) -> Result<Whole> {
    let bytes = location.get(name).await?;
    check(name, bytes, expected).await
}

async fn check(name: &ObjectName, bytes: Bytes, expected: Option<Expected>) -> Result<Whole> {
    let (its_name, its_bytes) = (name.clone(), bytes.clone());
    let header = pool::run(move || Header::check(&its_bytes, &its_name)).await??;
    let is_another = |expected: Expected| {
        bytes.len() as u64 != expected.size || !bytes.ends_with(&expected.hash)
    };
    if expected.is_some_and(is_another) {
        let reason = format!("object {name} is whole, and another than its manifest names");
        return Err(Error::new(Kind::Corrupt, reason));
    }
    let epoch = match name {
        // Under no key itself, it goes with those of its epoch.
        ObjectName::Wrap { epoch, .. } => *epoch,
        _ => header.epoch(),
    };
    Ok(Whole { name: name.clone(), epoch, bytes })
}

/// A location that may have it tomorrow counts more than one that has it damaged.
fn nowhere(name: &ObjectName, faults: &[Fault]) -> Error {
    let has = |kind| faults.iter().any(|(_, error)| error.kind() == kind);
    let kind = [Kind::Storage, Kind::Corrupt].into_iter().find(|kind| has(*kind));
    let reasons = faults.iter().map(|(at, error)| format!("at {at}: {}", error.message()));
    let reason = match faults.is_empty() {
        true => "no location that can be asked has it".to_string(),
        false => reasons.collect::<Vec<_>>().join("; "),
    };
    Error::new(kind.unwrap_or(Kind::Missing), format!("no whole copy of {name}: {reason}"))
}

/// Stores an object, whoever sealed it: the wraps of its epoch go first, ours or those of `sources`. Safe to drop.
pub async fn store(to: &Writer, whole: &Whole, sources: &[&Location]) -> Result<Put> {
    to.learn_wraps(whole.epoch, sources).await?;
    to.put(&whole.name, whole.epoch, whole.bytes.clone()).await
}

/// Stores an object in the place of one that is damaged. Looks at that one again first: what is whole by itself is never
/// deleted, and two whole objects of one name are an error of kind `Corrupt`. Dropped or failed in between the object
/// is absent, and copied as any other that is.
pub async fn replace(to: &Writer, whole: &Whole, sources: &[&Location]) -> Result<Put> {
    let (location, name) = (to.location(), &whole.name);
    to.learn_wraps(whole.epoch, sources).await?;
    location.require_cluster().await?;
    match location.get(name).await {
        Ok(bytes) if bytes == whole.bytes => return Ok(Put::Present),
        Ok(bytes) if check(name, bytes.clone(), None).await.is_ok() => {
            let place = location.name();
            let reason = format!("{name} is whole at {place}, and has another content elsewhere");
            return Err(Error::new(Kind::Corrupt, reason)
                .remedy("nothing is replaced: find out which of the two is forged"));
        }
        Err(error) if !matches!(error.kind(), Kind::Corrupt | Kind::Missing) => return Err(error),
        _ => {}
    }
    location
        .delete_durably(std::slice::from_ref(name))
        .await
        .context("delete a damaged object")
        .map_err(|error| {
            error.remedy("delete it by hand, as somebody who may; the next sync puts it back")
        })?;
    to.put(name, whole.epoch, whole.bytes.clone()).await.context("a damaged object was deleted")
}

#[cfg(test)]
mod tests;
