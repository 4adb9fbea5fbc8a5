//! How far the WAL has come. Pure: positions in, positions out.
//!
//! What always holds: `acknowledged` never goes back, and is never beyond what the policy has proved at the time when
//! it advanced. Nothing here outlives the process: after a restart the spool and the locations' listings tell it anew.

use backstay_common::config::Acknowledge;
use backstay_common::lsn::{Lsn, LsnRange};
use std::collections::BTreeSet;

/// The frontiers of one line of WAL.
#[derive(Clone, Debug)]
pub struct Frontier {
    received: Lsn,
    spooled: Lsn,
    /// Per location, in the order of the config; 0/0 where it is not known yet.
    stored: Vec<Lsn>,
    /// Per location: whether it counts for the policy.
    required: Vec<bool>,
    acknowledged: Lsn,
    /// Below this nothing is acknowledged: what an earlier line had acknowledged is not taken back.
    floor: Lsn,
}

impl Frontier {
    /// All before `spooled` is in the spool, fsynced.
    pub fn new(required: Vec<bool>, spooled: Lsn, floor: Lsn) -> Frontier {
        let stored = vec![Lsn::INVALID; required.len()];
        Frontier { received: spooled, spooled, stored, required, acknowledged: Lsn::INVALID, floor }
    }

    /// What has come from the server, checked, and written to the spool.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// What is fsynced in the spool.
    pub fn spooled(&self) -> Lsn {
        self.spooled
    }

    pub fn stored(&self, location: usize) -> Lsn {
        self.stored[location]
    }

    /// What PostgreSQL has been told; 0/0 for nothing yet.
    pub fn acknowledged(&self) -> Lsn {
        self.acknowledged
    }

    pub fn receive(&mut self, to: Lsn) {
        self.received = self.received.max(to);
    }

    pub fn spool(&mut self, to: Lsn) {
        self.spooled = self.spooled.max(to).min(self.received);
    }

    /// A location's frontier may also go back: what it held can be taken from it.
    pub fn store(&mut self, location: usize, to: Lsn) {
        self.stored[location] = to;
    }

    /// The spool was cut back to `to`: what lay beyond was not WAL, and must come again.
    pub fn retract(&mut self, to: Lsn) {
        self.received = self.received.min(to);
        self.spooled = self.spooled.min(to);
    }

    /// Advances what is acknowledged as far as `policy` allows, and returns it.
    pub fn acknowledge(&mut self, policy: Acknowledge) -> Lsn {
        let proved = self.proved(policy).min(self.received);
        if proved >= self.floor {
            self.acknowledged = self.acknowledged.max(proved);
        }
        self.acknowledged
    }

    /// What `policy` proves: the spool, or the position that so many required locations have reached as it needs.
    fn proved(&self, policy: Acknowledge) -> Lsn {
        let counts = self.stored.iter().zip(&self.required).filter(|(_, required)| **required);
        let mut stored: Vec<Lsn> = counts.map(|(stored, _)| *stored).collect();
        match policy.needed(stored.len()) {
            0 => self.spooled,
            needed => {
                stored.sort_unstable_by(|a, b| b.cmp(a));
                stored.get(needed - 1).copied().unwrap_or(Lsn::INVALID)
            }
        }
    }
}

/// What one location holds of one line: complete up to `end`, and ranges beyond a hole.
#[derive(Clone, Debug)]
pub struct Coverage {
    end: Lsn,
    ahead: BTreeSet<LsnRange>,
}

impl Coverage {
    pub fn new(begin: Lsn) -> Coverage {
        Coverage { end: begin, ahead: BTreeSet::new() }
    }

    pub fn end(&self) -> Lsn {
        self.end
    }

    /// `range` is stored. The order does not matter.
    pub fn add(&mut self, range: LsnRange) {
        self.ahead.insert(range);
        while let Some(first) = self.ahead.first().copied().filter(|r| r.start <= self.end) {
            self.end = self.end.max(first.end);
            self.ahead.pop_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::lsn::covered_until;
    use proptest::prelude::*;

    const POLICIES: [Acknowledge; 4] =
        [Acknowledge::Spool, Acknowledge::Any, Acknowledge::Majority, Acknowledge::All];

    fn at(position: u64) -> Lsn {
        Lsn::new(position)
    }

    #[test]
    fn each_policy_waits_for_what_it_names() {
        let mut frontier = Frontier::new(vec![true; 3], at(100), Lsn::INVALID);
        frontier.receive(at(200));
        frontier.spool(at(150));
        frontier.store(0, at(190));
        frontier.store(1, at(170));
        frontier.store(2, at(120));
        let expected = [150, 190, 170, 120];
        for (policy, expected) in POLICIES.into_iter().zip(expected) {
            assert_eq!(frontier.clone().acknowledge(policy), at(expected), "{policy:?}");
        }
    }

    #[test]
    fn a_best_effort_location_proves_nothing_and_delays_nothing() {
        let mut frontier = Frontier::new(vec![false, true, true], at(100), Lsn::INVALID);
        frontier.receive(at(200));
        frontier.spool(at(150));
        frontier.store(0, at(190));
        frontier.store(1, at(170));
        frontier.store(2, at(120));
        for (policy, expected) in POLICIES.into_iter().zip([150, 170, 120, 120]) {
            assert_eq!(frontier.clone().acknowledge(policy), at(expected), "{policy:?}");
        }
        frontier.store(0, Lsn::INVALID);
        assert_eq!(frontier.acknowledge(Acknowledge::All), at(120));
    }

    #[test]
    fn a_location_that_is_not_known_yet_counts_as_empty() {
        let mut frontier = Frontier::new(vec![true; 2], at(100), Lsn::INVALID);
        frontier.receive(at(200));
        frontier.store(0, at(200));
        assert_eq!(frontier.clone().acknowledge(Acknowledge::Majority), Lsn::INVALID);
        assert_eq!(frontier.clone().acknowledge(Acknowledge::All), Lsn::INVALID);
        assert_eq!(frontier.acknowledge(Acknowledge::Any), at(200));
    }

    #[test]
    fn a_new_line_says_nothing_below_its_floor() {
        let mut frontier = Frontier::new(vec![true; 0], at(100), at(150));
        assert_eq!(frontier.acknowledge(Acknowledge::Spool), Lsn::INVALID);
        frontier.receive(at(150));
        frontier.spool(at(150));
        assert_eq!(frontier.acknowledge(Acknowledge::Spool), at(150));
    }

    #[test]
    fn a_retraction_takes_no_acknowledgement_back() {
        let mut frontier = Frontier::new(vec![true; 0], at(100), Lsn::INVALID);
        frontier.receive(at(200));
        frontier.spool(at(200));
        assert_eq!(frontier.acknowledge(Acknowledge::Spool), at(200));
        frontier.retract(at(180));
        assert_eq!((frontier.received(), frontier.spooled()), (at(180), at(180)));
        assert_eq!(frontier.acknowledge(Acknowledge::Spool), at(200));
    }

    proptest! {
        #[test]
        fn acknowledged_never_goes_back_nor_beyond_the_proof(
            steps in proptest::collection::vec((0u8..5, 0usize..3, 0u64..1000), 1..200),
            policy in 0usize..4,
            required in proptest::collection::vec(proptest::bool::ANY, 2),
        ) {
            let policy = POLICIES[policy];
            let required = [&[true][..], &required].concat();
            let counts: Vec<usize> = (0..3).filter(|&l| required[l]).collect();
            let mut frontier = Frontier::new(required, at(1), Lsn::INVALID);
            let mut before = Lsn::INVALID;
            for (step, location, to) in steps {
                match step {
                    0 => frontier.receive(at(to)),
                    1 => frontier.spool(at(to)),
                    2 => frontier.store(location, at(to)),
                    3 => frontier.retract(at(to)),
                    _ => {}
                }
                prop_assert!(frontier.spooled() <= frontier.received());
                let now = frontier.acknowledge(policy);
                let proved = counts.iter().filter(|&&l| frontier.stored(l) >= now).count();
                prop_assert!(now >= before);
                if now > before {
                    prop_assert!(now <= frontier.received());
                    prop_assert!(proved >= policy.needed(counts.len()));
                    prop_assert!(policy != Acknowledge::Spool || now <= frontier.spooled());
                }
                before = now;
            }
        }

        #[test]
        fn coverage_is_that_of_the_ranges(
            ranges in proptest::collection::vec((0u64..100, 1u64..20), 0..40),
        ) {
            let ranges: Vec<LsnRange> =
                ranges.into_iter().map(|(s, l)| LsnRange::new(at(s), at(s + l))).collect();
            let mut coverage = Coverage::new(at(10));
            ranges.iter().for_each(|&range| coverage.add(range));
            prop_assert_eq!(coverage.end(), covered_until(at(10), &mut ranges.clone()));
        }
    }
}
