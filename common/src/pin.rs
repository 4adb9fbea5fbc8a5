//! `pins/<pin>/<n>`: somebody holds a snapshot, so that prune leaves it alone.
//!
//! A pin is the objects of one `<pin>`, a random number; the one with the greatest `<n>` speaks for it. So a pin is renewed,
//! given back or prolonged by an identity that may only create. It ends at its `until`, if it has one.

use crate::cbor::{self, Fields};
use crate::id::{ObjectId, SnapshotId, SystemId};
use crate::keys::Epoch;
use crate::name::ObjectName;
use crate::seal::{self, Draft, Header, Object, ObjectKind, Sealed};
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// The longest reason that a pin carries, in bytes.
pub const REASON_BYTES_MAX: usize = 1024;

/// How much of the WAL a pin keeps besides its snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[cbor(index_only)]
pub enum Hold {
    /// Only what makes the snapshot consistent: it can be restored as it is.
    #[n(0)]
    Consistent,
    /// All WAL from its start on, along every history that passes through it: any later moment can be restored.
    #[n(1)]
    Onwards,
}

/// The plain section of a pin; it needs no key to be read.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PinRecord {
    /// What is held.
    #[n(0)]
    pub snapshot: SnapshotId,
    #[n(1)]
    pub hold: Hold,
    /// For people.
    #[n(2)]
    pub reason: String,
    /// Who holds it: an agent or a host. For people.
    #[n(3)]
    pub by: String,
    /// Unix seconds.
    #[n(4)]
    pub made: i64,
    /// Unix seconds; without it the pin holds until it is given back.
    #[n(5)]
    pub until: Option<i64>,
    /// The pin has been given back.
    #[n(6)]
    pub released: bool,
    /// The snapshot with damaged pages for whose sake `snapshot`, the last one that has them whole, is held.
    #[n(7)]
    pub damage: Option<SnapshotId>,
    /// True for the pin of a restore: it renews it while it runs, and gives it back itself.
    #[n(64)]
    pub restore: Option<bool>,
}

impl Fields for PinRecord {
    const KNOWN: u64 = 8;
    const WHAT: &'static str = "a pin";
}

impl PinRecord {
    /// The plain section, after the trailer has been checked. Needs no key.
    pub fn read(bytes: &Bytes, name: &ObjectName) -> Result<PinRecord> {
        let header = Header::check(bytes, name)?;
        match name {
            ObjectName::Pin { .. } => cbor::decode(header.plain()),
            _ => Err(Error::new(Kind::Bug, format!("{name} is no pin"))),
        }
    }

    /// As [`PinRecord::read`], authenticated.
    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<PinRecord> {
        Object::open(bytes.clone(), name, epoch)?;
        PinRecord::read(&bytes, name)
    }

    pub fn seal(&self, epoch: &Epoch, system: SystemId, pin: ObjectId, seq: u64) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Pin,
            plain: cbor::encode(self),
            frames: Vec::new(),
            meta: Vec::new(),
        };
        seal::seal(draft, epoch, |_| ObjectName::Pin { system, pin, seq })
    }

    /// True while it holds its snapshot, at `now` in Unix seconds.
    pub fn holds(&self, now: i64) -> bool {
        !self.released && self.until.is_none_or(|until| now < until)
    }

    /// True if a restore holds it.
    pub fn is_of_restore(&self) -> bool {
        self.restore == Some(true)
    }

    /// The same pin, given back.
    pub fn given_back(&self) -> PinRecord {
        PinRecord { released: true, ..self.clone() }
    }
}

/// The one pin that keeps what is whole for the sake of `damaged`: every agent gives it the same name.
pub fn damage_pin(damaged: SnapshotId) -> ObjectId {
    let hash =
        blake3::derive_key("backstay 2026-11-22 v1 damage pin", damaged.to_string().as_bytes());
    ObjectId::from_bytes(hash[..8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_reads_back_without_a_key_and_ends() {
        let pin = PinRecord {
            snapshot: "20261122T020000Z-1f2e3d4c".parse().unwrap(),
            hold: Hold::Onwards,
            reason: "before the migration".into(),
            by: "db1".into(),
            made: 10,
            until: Some(20),
            released: false,
            damage: None,
            restore: Some(true),
        };
        let epoch = Epoch::generate();
        let sealed = pin.seal(&epoch, SystemId::new(7), ObjectId::random(), 3);
        assert_eq!(PinRecord::read(&sealed.bytes, &sealed.name).unwrap(), pin);
        assert_eq!(PinRecord::open(sealed.bytes.clone(), &sealed.name, &epoch).unwrap(), pin);
        assert!(PinRecord::open(sealed.bytes, &sealed.name, &Epoch::generate()).is_err());
        assert!(pin.holds(19) && !pin.holds(20) && !pin.given_back().holds(19));
        assert!(PinRecord { until: None, ..pin }.holds(i64::MAX));
    }
}
