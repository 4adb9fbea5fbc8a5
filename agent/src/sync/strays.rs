//! WAL that was copied to a location while it was also being shipped there.
//!
//! Whoever ships knows which pieces it has stored, and deletes them when their span is there; of a copy it knows
//! nothing. So each copy is noted before it is made, and what is stored later at the same location says which copies it
//! covers. Forgotten in a crash; the comparison at the next start finds what is left.

use backstay_common::id::LocationName;
use backstay_common::lsn::LsnRange;
use backstay_common::name::ObjectName;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

/// More than this at one location are left to the next comparison.
const STRAYS_MAX: usize = 10_000;

/// By location.
#[derive(Debug, Default)]
pub struct Strays(Mutex<BTreeMap<LocationName, BTreeSet<ObjectName>>>);

impl Strays {
    /// `name` is about to be copied to `location`. A whole span is covered by nothing, and not noted.
    pub fn note(&self, location: &LocationName, name: &ObjectName) {
        let ObjectName::Wal { range, .. } = name else { return };
        if range.start == range.start.span_start() && range.end == range.start.next_span() {
            return;
        }
        let mut strays = self.0.lock().expect("no panic while held");
        let here = strays.entry(location.clone()).or_default();
        if here.len() < STRAYS_MAX {
            here.insert(name.clone());
        }
    }

    /// The copies at `location` that `longer`, which has been stored there, does instead of. They are forgotten here.
    pub fn covered(&self, location: &LocationName, longer: &ObjectName) -> Vec<ObjectName> {
        let ObjectName::Wal { system, branch, range, .. } = longer else { return Vec::new() };
        let is_covered = |name: &ObjectName| match name {
            ObjectName::Wal { system: s, branch: b, range: piece, .. } => {
                (s, b) == (system, branch) && is_longer(range, piece)
            }
            _ => false,
        };
        let mut strays = self.0.lock().expect("no panic while held");
        let here = strays.get_mut(location);
        here.map_or_else(Vec::new, |here| here.extract_if(.., is_covered).collect())
    }
}

fn is_longer(longer: &LsnRange, piece: &LsnRange) -> bool {
    longer.covers(piece) && longer.len() > piece.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::id::{ObjectId, SystemId};
    use backstay_common::lsn::{Lsn, SPAN_BYTES};

    fn wal(start: u64, end: u64) -> ObjectName {
        ObjectName::Wal {
            system: SystemId::new(7),
            branch: "00000001-01020304".parse().unwrap(),
            range: LsnRange::new(Lsn::new(start), Lsn::new(end)),
            id: ObjectId::random(),
        }
    }

    #[test]
    fn a_copy_is_named_once_by_the_span_that_covers_it_at_the_same_location() {
        let strays = Strays::default();
        let [here, there]: [LocationName; 2] = ["here", "there"].map(|name| name.parse().unwrap());
        let (piece, next) = (wal(16, 32), wal(SPAN_BYTES, SPAN_BYTES + 5));
        let span = wal(0, SPAN_BYTES);
        for name in [&piece, &next, &span] {
            strays.note(&here, name);
        }
        assert_eq!(strays.covered(&there, &span), []);
        assert_eq!(strays.covered(&here, &wal(16, 32)), [], "of equal ranges none goes");
        assert_eq!(strays.covered(&here, &span), [piece]);
        assert_eq!(strays.covered(&here, &span), []);
        assert_eq!(strays.covered(&here, &wal(SPAN_BYTES, 2 * SPAN_BYTES)), [next]);
    }
}
