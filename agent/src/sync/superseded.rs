//! Pieces whose span is at the same location go.
//!
//! Whoever ships deletes them; nobody remembers those of an agent that was killed between the PUT of the span and
//! their deletion. A name proves nothing: the span is read whole and opened first.

use crate::context::AgentContext;
use crate::copy;
use backstay_common::id::{Branch, ObjectId, SystemId};
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::span::WalObject;
use backstay_common::{Error, Kind, Result};
use std::collections::{BTreeMap, BTreeSet};

/// What was done at one location.
#[derive(Debug, Default)]
pub struct Deletion {
    pub deleted: Vec<ObjectName>,
    /// Longer objects that are not what their names say.
    pub damaged: BTreeMap<ObjectName, String>,
}

/// Deletes pieces for which a longer object is whole at the same location. An identity that may not delete leaves them
/// to prune.
pub async fn delete(
    context: &AgentContext,
    location: &Location,
    names: &BTreeSet<ObjectName>,
) -> Deletion {
    let mut done = Deletion::default();
    for (longer, pieces) in superseded(names) {
        match prove(context, location, &longer).await {
            Ok(()) => {}
            Err(error) if error.kind() == Kind::Corrupt => {
                done.damaged.insert(longer, error.message().to_string());
                continue;
            }
            Err(error) => {
                tracing::debug!(%error, "superseded pieces are left");
                continue;
            }
        }
        match location.delete(&pieces).await {
            Ok(()) => {
                let (place, count) = (location.name(), pieces.len());
                tracing::info!(location = %place, count, "deleted superseded pieces");
                done.deleted.extend(pieces);
            }
            Err(error) => tracing::debug!(%error, "superseded pieces are left"),
        }
    }
    done
}

/// Reads and opens all of a WAL object. Safe to drop.
pub async fn prove(context: &AgentContext, location: &Location, name: &ObjectName) -> Result<()> {
    let whole = copy::read(location, name, None).await?;
    let keyring = context.epochs.keyring();
    let epoch = keyring.epoch(context.system, whole.epoch, location).await?;
    let opened = move || WalObject::open(whole.bytes, &whole.name, &epoch)?.wal().map(drop);
    tokio::task::spawn_blocking(opened)
        .await
        .unwrap_or_else(|_| Err(Error::new(Kind::Bug, "opening a WAL object panicked")))
}

/// For each WAL object whose range covers shorter ones those that it covers.
pub fn superseded(names: &BTreeSet<ObjectName>) -> Vec<(ObjectName, Vec<ObjectName>)> {
    let mut branches: BTreeMap<(SystemId, Branch), Vec<(LsnRange, ObjectId)>> = BTreeMap::new();
    for name in names {
        if let ObjectName::Wal { system, branch, range, id } = *name {
            branches.entry((system, branch)).or_default().push((range, id));
        }
    }
    let mut found: Vec<(ObjectName, Vec<ObjectName>)> = Vec::new();
    for ((system, branch), mut objects) in branches {
        objects.sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        let mut longest = LsnRange::new(Lsn::INVALID, Lsn::INVALID);
        for (range, id) in objects {
            let name = ObjectName::Wal { system, branch, range, id };
            if range.end > longest.end {
                longest = range;
                found.push((name, Vec::new()));
            } else if longest.covers(&range)
                && longest.len() > range.len()
                && let Some((_, pieces)) = found.last_mut()
            {
                pieces.push(name);
            }
        }
    }
    found.retain(|(_, pieces)| !pieces.is_empty());
    found
}
