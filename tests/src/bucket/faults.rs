//! What is to go wrong, scripted by operation, key, turn or chance.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A request, by what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    Put,
    Get,
    Head,
    List,
    /// Of one object or of many.
    Delete,
    /// Any request of a multipart upload.
    Multipart,
    Other,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Answers this HTTP status; nothing is done.
    ErrorBefore(u16),
    /// Does it, then answers this HTTP status.
    ErrorAfterCommit(u16),
    /// Closes the connection; nothing is done.
    DropBefore,
    /// Does it, then closes the connection.
    DropAfterCommit,
    /// Resets the connection (a TCP RST); nothing is done.
    Reset,
    /// Does it, then resets the connection.
    ResetAfterCommit,
    /// Takes half of the request's body, then resets the connection; nothing is done.
    HalfRequest,
    /// Never answers; nothing is done.
    Hang,
    /// Does it, and never answers.
    HangAfterCommit,
    /// Does it later.
    Delay(Duration),
    /// Sends the first half of the body, then closes the connection.
    Truncate,
    /// Flips a bit in the middle of the body.
    Corrupt,
}

/// One thing that goes wrong: `Fault::on(Operation::Put, action).key("pack/").skip(2).times(1)`.
#[derive(Clone, Debug)]
pub struct Fault {
    operation: Option<Operation>,
    key: String,
    skip: u64,
    times: u64,
    probability: f64,
    action: Action,
}

impl Fault {
    /// Does `action` to every `operation`, until it is narrowed.
    pub fn on(operation: Operation, action: Action) -> Fault {
        Fault { operation: Some(operation), ..Fault::always(action) }
    }

    /// Does `action` to every request, until it is narrowed.
    pub fn always(action: Action) -> Fault {
        Fault {
            operation: None,
            key: String::new(),
            skip: 0,
            times: u64::MAX,
            probability: 1.0,
            action,
        }
    }

    /// Only where this is part of the path, `/bucket/prefix/name`. A deletion of many has only
    /// `/bucket`.
    pub fn key(mut self, part: impl Into<String>) -> Fault {
        self.key = part.into();
        self
    }

    /// Lets the first `n` that match pass.
    pub fn skip(mut self, n: u64) -> Fault {
        self.skip = n;
        self
    }

    /// At most `n` times.
    pub fn times(mut self, n: u64) -> Fault {
        self.times = n;
        self
    }

    /// Each time only by chance, drawn from the seed that `Faults::seed` sets.
    pub fn probability(mut self, probability: f64) -> Fault {
        self.probability = probability;
        self
    }
}

/// Names a fault that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FaultId(u64);

/// The script of one server. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    script: Arc<Mutex<Script>>,
    cuts: Arc<watch::Sender<u64>>,
}

#[derive(Debug, Default)]
struct Script {
    faults: BTreeMap<FaultId, (Fault, Tally)>,
    added: u64,
    refused: bool,
    conditions_ignored: bool,
    versions_told: bool,
    chance: u64,
    counts: BTreeMap<Operation, u64>,
}

#[derive(Debug, Default)]
struct Tally {
    matched: u64,
    fired: u64,
}

impl Faults {
    /// Adds a fault. Of several that match a request, the one added first is done.
    pub fn add(&self, fault: Fault) -> FaultId {
        let mut script = self.script();
        script.added += 1;
        let id = FaultId(script.added);
        script.faults.insert(id, (fault, Tally::default()));
        id
    }

    pub fn remove(&self, id: FaultId) {
        self.script().faults.remove(&id);
    }

    /// All is well again: no faults, not refused, conditions kept.
    pub fn clear(&self) {
        let mut script = self.script();
        script.faults.clear();
        script.refused = false;
        script.conditions_ignored = false;
        script.versions_told = false;
    }

    /// The location is down: every connection is closed at once, until told otherwise.
    pub fn refuse(&self, refused: bool) {
        self.script().refused = refused;
    }

    /// Resets every connection that there is, whatever is on its way; what has arrived whole may be done or not.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Changes with each cut from now on.
    pub(super) fn cuts(&self) -> watch::Receiver<u64> {
        self.cuts.subscribe()
    }

    /// Writes over objects in spite of `If-None-Match` and `If-Match`, as some servers do.
    pub fn ignore_conditions(&self, ignored: bool) {
        self.script().conditions_ignored = ignored;
    }

    /// Answers as a bucket does that keeps versions. It keeps none.
    pub fn tell_versions(&self, told: bool) {
        self.script().versions_told = told;
    }

    /// Chances are drawn from here on.
    pub fn seed(&self, seed: u64) {
        self.script().chance = seed;
    }

    /// How often a fault has been done.
    pub fn fired(&self, id: FaultId) -> u64 {
        self.script().faults.get(&id).map_or(0, |(_, tally)| tally.fired)
    }

    pub(super) fn refused(&self) -> bool {
        self.script().refused
    }

    pub(super) fn conditions_ignored(&self) -> bool {
        self.script().conditions_ignored
    }

    pub(super) fn versions_told(&self) -> bool {
        self.script().versions_told
    }

    pub(super) fn counts(&self) -> BTreeMap<Operation, u64> {
        self.script().counts.clone()
    }

    /// Counts a request, and says what is to be done to it.
    pub(super) fn next(&self, operation: Operation, path: &str) -> Option<Action> {
        let script = &mut *self.script();
        *script.counts.entry(operation).or_default() += 1;
        for (fault, tally) in script.faults.values_mut() {
            let matches = fault.operation.is_none_or(|wanted| wanted == operation)
                && path.contains(&fault.key);
            if !matches {
                continue;
            }
            tally.matched += 1;
            let due = tally.matched > fault.skip && tally.fired < fault.times;
            if due && draw(&mut script.chance) < fault.probability {
                tally.fired += 1;
                return Some(fault.action);
            }
        }
        None
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The next number of SplitMix64, in `0.0..1.0`.
fn draw(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_keys_and_times() {
        let faults = Faults::default();
        let fault = Fault::on(Operation::Put, Action::Hang).key("/wal/").skip(1).times(2);
        let id = faults.add(fault);
        let mut put = |key| faults.next(Operation::Put, key).is_some();
        assert_eq!(["/b/wal/1", "/b/pack/1", "/b/wal/2"].map(&mut put), [false, false, true]);
        assert_eq!(["/b/wal/3", "/b/wal/4"].map(&mut put), [true, false]);
        assert_eq!(faults.next(Operation::Get, "/b/wal/1"), None);
        assert_eq!(faults.fired(id), 2);
        assert_eq!(faults.counts()[&Operation::Put], 5);
    }

    #[test]
    fn chance_follows_the_seed() {
        let run = |seed| {
            let faults = Faults::default();
            faults.seed(seed);
            faults.add(Fault::always(Action::Hang).probability(0.3));
            (0..1000).map(|_| faults.next(Operation::Get, "").is_some()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert!((200..400).contains(&run(1).iter().filter(|fired| **fired).count()));
    }
}
