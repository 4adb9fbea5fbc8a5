//! Reading one object from whichever location has it whole.

use super::Access;
use backstay_common::catalog::Places;
use backstay_common::id::EpochId;
use backstay_common::keys::Epoch;
use backstay_common::location::Location;
use backstay_common::name::ObjectName;
use backstay_common::seal::Header;
use backstay_common::{Error, Kind, Result, footer, pool};
use bytes::Bytes;
use std::sync::Arc;

/// How the bytes of one kind of object become a value: `WalObject::open`, `Head::open` and their like.
pub type Open<T> = fn(Bytes, &ObjectName, &Epoch) -> Result<T>;

impl Access {
    /// Fetches, checks and opens `name`, from the first of `places` that has it whole. The error, if none has, names the
    /// object and what was wrong with it everywhere. Safe to drop.
    pub async fn read<T>(&self, name: &ObjectName, places: Places, open: Open<T>) -> Result<T>
    where
        T: Send + 'static,
    {
        self.first_good(name, places, |location| self.read_at(name, location, open)).await
    }

    /// Only the metadata of an object of `size` bytes that has no plain section. Safe to drop.
    pub async fn read_meta(&self, name: &ObjectName, size: u64, places: Places) -> Result<Vec<u8>> {
        self.first_good(name, places, |location| self.read_meta_at(name, size, location)).await
    }

    /// Tries `places` in order until one gives a good answer; what the others lacked is logged.
    pub(super) async fn first_good<'a, T, F, Fut>(
        &'a self,
        name: &ObjectName,
        places: Places,
        fetch: F,
    ) -> Result<T>
    where
        F: Fn(&'a Location) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let mut faults: Vec<Error> = Vec::new();
        for location in places.iter().filter_map(|index| self.locations.get(index)) {
            match fetch(location).await {
                Ok(value) => return Ok(value),
                Err(error) => {
                    let place = location.name();
                    tracing::warn!(object = %name, location = %place, %error, "trying another location");
                    faults.push(error.context(format!("at {place}")));
                }
            }
        }
        Err(no_good_copy(name, faults))
    }

    async fn read_at<T>(&self, name: &ObjectName, location: &Location, open: Open<T>) -> Result<T>
    where
        T: Send + 'static,
    {
        let bytes = location.get(name).await?;
        let (checked, its_name) = (bytes.clone(), name.clone());
        let header = pool::run(move || Header::check(&checked, &its_name)).await??;
        let epoch = self.epoch(header.epoch(), location).await?;
        let its_name = name.clone();
        pool::run(move || open(bytes, &its_name, &epoch)).await?
    }

    async fn read_meta_at(
        &self,
        name: &ObjectName,
        size: u64,
        location: &Location,
    ) -> Result<Vec<u8>> {
        let fetched = footer::fetch(location, name, size).await?;
        let epoch = self.epoch(fetched.epoch(), location).await?;
        pool::run(move || fetched.meta(&epoch)).await?
    }

    /// The epoch `id`: from the wraps at `location`, or else from those anywhere.
    pub async fn epoch(&self, id: EpochId, location: &Location) -> Result<Arc<Epoch>> {
        let error = match self.keyring.epoch(self.system, id, location).await {
            Ok(epoch) => return Ok(epoch),
            Err(error) => error,
        };
        for other in self.locations.iter().filter(|other| other.name() != location.name()) {
            if let Ok(epoch) = self.keyring.epoch(self.system, id, other).await {
                return Ok(epoch);
            }
        }
        Err(error)
    }
}

/// Of several faults the one that a person must act on first decides the kind: a wrong key is wrong everywhere.
fn no_good_copy(name: &ObjectName, faults: Vec<Error>) -> Error {
    const GRAVEST_FIRST: [Kind; 4] = [Kind::Key, Kind::Corrupt, Kind::Missing, Kind::Storage];
    let Some(first) = faults.first() else {
        return Error::new(Kind::Missing, format!("object {name} is at no location that answers"));
    };
    let gravest = GRAVEST_FIRST.into_iter().find(|kind| faults.iter().any(|e| e.kind() == *kind));
    let kind = gravest.unwrap_or(first.kind());
    let remedy = faults.iter().filter(|e| e.kind() == kind).find_map(|e| e.remedy_text());
    let remedy = remedy.unwrap_or("bring back a location that has it whole").to_string();
    let list: Vec<&str> = faults.iter().map(Error::message).collect();
    let reason = format!("object {name} cannot be read from any location: {}", list.join("; "));
    Error::new(kind, reason).remedy(remedy)
}
