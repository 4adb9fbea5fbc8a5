//! The shelf: which sealed objects there are, and which location has them. Pure: what happened goes in, what to do
//! comes out.
//!
//! Every location has a queue of its own here, which holds names only; the bytes are in the folder `sealed`. So a
//! location that lags costs no memory, and the others nothing. An object is for every location; a piece whose range
//! another, longer object covers need not be sent any more, and may be deleted where that one is stored.

use super::frontier::Coverage;
use backstay_common::id::{Branch, EpochId, ObjectId, SystemId};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

/// One sealed object of WAL, as it lies in the folder `sealed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The number of its line: greater is later.
    pub line: u32,
    pub system: SystemId,
    pub branch: Branch,
    pub range: LsnRange,
    pub id: ObjectId,
    /// Sealed bytes.
    pub size: u64,
    /// The epoch that it is sealed under.
    pub epoch: EpochId,
    /// When it was put on the shelf.
    pub since: Instant,
}

impl Item {
    pub fn name(&self) -> ObjectName {
        let Item { system, branch, range, id, .. } = *self;
        ObjectName::Wal { system, branch, range, id }
    }

    /// True if the span ends with it: it is no piece.
    pub fn closes_span(&self) -> bool {
        self.range.end == self.range.end.span_start()
    }

    /// True if it makes `other` superfluous.
    fn supersedes(&self, other: &Item) -> bool {
        self.line == other.line
            && self.range.covers(&other.range)
            && self.range.len() > other.range.len()
    }

    fn key(&self) -> Key {
        (self.line, self.range.start, self.range.end, self.id)
    }
}

/// The order in which objects are sent.
type Key = (u32, Lsn, Lsn, ObjectId);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waiting,
    Sending,
    Stored,
    /// A longer object does instead.
    Superseded,
}

#[derive(Debug)]
struct Entry {
    item: Arc<Item>,
    /// By location.
    places: Vec<Place>,
    /// By location: a write failed, and may have stored it all the same.
    doubts: Vec<bool>,
    /// A longer object is, or was, on the shelf.
    is_superseded: bool,
}

impl Entry {
    fn is_done_at(&self, location: usize) -> bool {
        matches!(self.places[location], Place::Stored | Place::Superseded)
    }
}

/// Whose progress decides what may be forgotten here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Every location's: there is room enough.
    WithAll,
    /// The required locations' only. Another one gets what it missed by copying, later.
    WithRequired,
}

/// Everything that is sealed and not yet forgotten.
#[derive(Debug)]
pub struct Shelf {
    /// By location: whether it is required.
    required: Vec<bool>,
    entries: BTreeMap<Key, Entry>,
    /// What each location holds of each line, once it has been listed.
    listed: HashMap<(usize, u32), Listed>,
}

/// What a location holds of a line.
#[derive(Debug)]
struct Listed {
    /// Where the spool began when it was listed.
    begin: Lsn,
    coverage: Coverage,
    /// It has all that precedes `begin`, as far as anybody has it.
    is_whole: bool,
}

impl Shelf {
    pub fn new(required: Vec<bool>) -> Shelf {
        Shelf { required, entries: BTreeMap::new(), listed: HashMap::new() }
    }

    /// The locations that are waited for.
    pub fn waited_for(&self, patience: Patience) -> impl Iterator<Item = usize> {
        let counts = move |required: &bool| *required || patience == Patience::WithAll;
        self.required
            .iter()
            .enumerate()
            .filter(move |(_, required)| counts(required))
            .map(|(l, _)| l)
    }

    /// True if all that are waited for have it, and it is on its way to nobody.
    fn is_done(&self, entry: &Entry, patience: Patience) -> bool {
        self.waited_for(patience).all(|l| entry.is_done_at(l))
            && !entry.places.contains(&Place::Sending)
    }

    /// A sealed object for every location. Pieces that it covers are not sent any more.
    pub fn add(&mut self, item: Item) {
        let item = Arc::new(item);
        for entry in self.line_mut(item.line) {
            if item.supersedes(&entry.item) {
                entry.is_superseded = true;
                let waiting = entry.places.iter_mut().filter(|p| **p == Place::Waiting);
                waiting.for_each(|place| *place = Place::Superseded);
            }
        }
        let places = vec![Place::Waiting; self.required.len()];
        let doubts = vec![false; self.required.len()];
        let is_superseded = self.longer(&item).next().is_some();
        self.entries.insert(item.key(), Entry { item, places, doubts, is_superseded });
    }

    /// The objects that make `item` superfluous: of its span, and beginning no later.
    fn longer<'s>(&'s self, item: &'s Item) -> impl Iterator<Item = &'s Entry> {
        let first = ObjectId::from_bytes([0; 8]);
        let from = (item.line, item.range.start.span_start(), Lsn::INVALID, first);
        let to = (item.line, item.range.start.add(1), Lsn::INVALID, first);
        self.entries.range(from..to).map(|(_, e)| e).filter(|e| e.item.supersedes(item))
    }

    /// The objects that `item` makes superfluous.
    fn shorter<'s>(&'s self, item: &'s Item) -> impl Iterator<Item = &'s Entry> {
        let first = ObjectId::from_bytes([0; 8]);
        let from = (item.line, item.range.start, Lsn::INVALID, first);
        let to = (item.line, item.range.end, Lsn::INVALID, first);
        self.entries.range(from..to).map(|(_, e)| e).filter(|e| item.supersedes(&e.item))
    }

    fn line_mut(&mut self, line: u32) -> impl Iterator<Item = &mut Entry> {
        let all = (line, Lsn::INVALID, Lsn::INVALID, ObjectId::from_bytes([0; 8]))..;
        self.entries.range_mut(all).map(|(_, entry)| entry).take_while(move |e| e.item.line == line)
    }

    /// What `location` holds of `line`, by its listing: complete ranges from `begin` on.
    pub fn listed(
        &mut self,
        location: usize,
        line: u32,
        begin: Lsn,
        found: &[(LsnRange, ObjectId)],
    ) {
        let mut coverage = Coverage::new(begin);
        for &(range, _) in found {
            coverage.add(range);
        }
        for entry in self.line_mut(line) {
            let (range, id) = (entry.item.range, entry.item.id);
            let place = &mut entry.places[location];
            if found.contains(&(range, id)) {
                *place = Place::Stored;
            } else if found.iter().any(|(r, _)| r.covers(&range) && r.len() > range.len())
                && *place == Place::Waiting
            {
                *place = Place::Superseded;
            }
            if *place == Place::Stored {
                coverage.add(range);
            }
        }
        self.listed.insert((location, line), Listed { begin, coverage, is_whole: false });
    }

    /// `location` lacks nothing of what precedes `begin` that it could have. From now on it counts, unless it has been listed
    /// from elsewhere since.
    pub fn complete(&mut self, location: usize, line: u32, begin: Lsn) {
        if let Some(listed) = self.listed.get_mut(&(location, line)) {
            listed.is_whole |= listed.begin == begin;
        }
    }

    /// True if it is known what `location` holds of `line` from `begin` on, where the spool begins by now. What was stored and
    /// forgotten while a listing was under way is in none.
    pub fn is_listed(&self, location: usize, line: u32, begin: Lsn) -> bool {
        self.listed.get(&(location, line)).is_some_and(|listed| listed.coverage.end() >= begin)
    }

    pub fn is_listed_from(&self, location: usize, line: u32, begin: Lsn) -> bool {
        self.listed.get(&(location, line)).is_some_and(|listed| listed.begin == begin)
    }

    /// The next object for `location`, whose line has been listed, of at most so many bytes. It counts as being sent
    /// until [`Shelf::sent`] or [`Shelf::failed`].
    pub fn next(&mut self, location: usize, bytes_max: u64) -> Option<Arc<Item>> {
        let listed = &self.listed;
        let entry = self.entries.values_mut().find(|e| {
            e.places[location] == Place::Waiting
                && e.item.size <= bytes_max
                && listed.contains_key(&(location, e.item.line))
        })?;
        entry.places[location] = Place::Sending;
        Some(entry.item.clone())
    }

    /// `location` has `item`. Returns the pieces that it may forget for that.
    pub fn sent(&mut self, location: usize, item: &Item) -> Vec<ObjectName> {
        if let Some(listed) = self.listed.get_mut(&(location, item.line)) {
            listed.coverage.add(item.range);
        }
        let mut superfluous = Vec::new();
        for entry in self.line_mut(item.line) {
            let place = &mut entry.places[location];
            if entry.item.id == item.id && entry.item.range == item.range {
                *place = Place::Stored;
            } else if item.supersedes(&entry.item) {
                match place {
                    Place::Stored => superfluous.push(entry.item.name()),
                    Place::Waiting | Place::Superseded => {
                        *place = Place::Superseded;
                        if std::mem::take(&mut entry.doubts[location]) {
                            superfluous.push(entry.item.name());
                        }
                    }
                    Place::Sending => continue,
                }
            }
        }
        superfluous.extend(self.is_overtaken(location, item).then(|| item.name()));
        superfluous
    }

    /// True if `location` got a longer object while this one was on its way.
    fn is_overtaken(&self, location: usize, item: &Item) -> bool {
        self.longer(item).any(|e| e.places[location] == Place::Stored)
    }

    /// `item` is to be sent again, unless a longer object is on the shelf by now. Returns its name if that one is stored
    /// already, and this one may be too.
    pub fn failed(&mut self, location: usize, item: &Item) -> Option<ObjectName> {
        let superseded = self.longer(item).next().is_some();
        let overtaken = self.is_overtaken(location, item);
        if let Some(entry) = self.entries.get_mut(&item.key()) {
            entry.places[location] = if superseded { Place::Superseded } else { Place::Waiting };
            entry.doubts[location] = !overtaken;
        }
        overtaken.then(|| item.name())
    }

    /// How far `location` has all of `line` without a hole, and all that precedes it; 0/0 where that is not known or not so.
    pub fn frontier(&self, location: usize, line: u32) -> Lsn {
        let is_whole = self.listed.get(&(location, line)).is_some_and(|listed| listed.is_whole);
        match is_whole && self.has_before(location, line) {
            true => self.reach(location, line),
            false => Lsn::INVALID,
        }
    }

    /// True if `location` has all that is here of the lines before `line`.
    pub fn has_before(&self, location: usize, line: u32) -> bool {
        let mut before = self.entries.values().take_while(|e| e.item.line < line);
        before.all(|entry| entry.is_done_at(location))
    }

    /// How far `location` has all of `line`, whatever it has of the lines before; 0/0 where that is not known.
    pub fn reach(&self, location: usize, line: u32) -> Lsn {
        self.listed.get(&(location, line)).map_or(Lsn::INVALID, |listed| listed.coverage.end())
    }

    /// The WAL of `line` before `until` is no longer here. Its objects are taken off the shelf, but for those that are on
    /// their way. Locations that lack some of it are to be listed anew.
    pub fn give_up(&mut self, line: u32, until: Lsn) -> Vec<Arc<Item>> {
        self.list_again(line, until);
        let is_sent = |e: &Entry| e.places.contains(&Place::Sending);
        let old = self.line_mut(line).filter(|e| e.item.range.end <= until && !is_sent(e));
        let gone: Vec<Key> = old.map(|e| e.item.key()).collect();
        gone.iter().filter_map(|key| self.entries.remove(key)).map(|e| e.item).collect()
    }

    /// Locations that lack some of `line` before `until` are to be listed anew.
    pub fn list_again(&mut self, line: u32, until: Lsn) {
        self.listed.retain(|(_, of), listed| *of != line || listed.coverage.end() >= until);
    }

    /// Takes off the shelf what every location that is waited for has: objects of `line` that end at or before `until`, and pieces for which
    /// a longer object is there. A piece stays while a location that has it lacks the longer object, and the longer object
    /// while a piece is on its way, or else nobody would remember to delete the piece. A location that was not
    /// waited for must be listed again.
    pub fn retire(&mut self, line: u32, until: Lsn, patience: Patience) -> Vec<Arc<Item>> {
        let is_awaited =
            |e: &Entry| self.shorter(&e.item).any(|piece| piece.places.contains(&Place::Sending));
        let over = |e: &Entry| {
            if !e.is_superseded || self.longer(&e.item).next().is_none() {
                return e.item.range.end <= until;
            }
            let is_there = |l: usize| self.longer(&e.item).any(|o| o.places[l] == Place::Stored);
            let is_absent = |l: usize| e.places[l] == Place::Superseded && !e.doubts[l];
            (0..self.required.len()).all(|l| is_absent(l) || is_there(l))
        };
        let of_line = self.entries.values().filter(|e| e.item.line == line);
        let gone = of_line.filter(|e| self.is_done(e, patience) && over(e) && !is_awaited(e));
        let gone: Vec<Key> = gone.map(|e| e.item.key()).collect();
        let gone: Vec<Entry> = gone.iter().filter_map(|key| self.entries.remove(key)).collect();
        for entry in &gone {
            let missed = (0..self.required.len()).filter(|&l| !entry.is_done_at(l));
            missed.for_each(|location| drop(self.listed.remove(&(location, line))));
        }
        gone.into_iter().map(|entry| entry.item).collect()
    }

    /// True if every location that is waited for has all that is on the shelf of `line`.
    pub fn is_line_done(&self, line: u32, patience: Patience) -> bool {
        let mut entries = self.entries.values().filter(|e| e.item.line == line);
        entries.all(|entry| self.is_done(entry, patience))
    }

    /// What has been sealed of `line`.
    pub fn ranges(&self, line: u32) -> Vec<LsnRange> {
        self.entries.values().filter(|e| e.item.line == line).map(|e| e.item.range).collect()
    }

    /// The ids of what is here of `line`.
    pub fn ids(&self, line: u32) -> HashSet<ObjectId> {
        self.entries.values().filter(|e| e.item.line == line).map(|e| e.item.id).collect()
    }

    /// Objects that wait for `location` or are on their way, and since when the oldest of them does.
    pub fn backlog(&self, location: usize) -> (usize, Option<Instant>) {
        let open = self
            .entries
            .values()
            .filter(|e| matches!(e.places[location], Place::Waiting | Place::Sending));
        open.fold((0, None), |(count, oldest), e| {
            let since = e.item.since;
            (count + 1, Some(oldest.map_or(since, |o: Instant| o.min(since))))
        })
    }

    /// Sealed bytes on the shelf.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|e| e.item.size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::Patience::{WithAll, WithRequired};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn item(line: u32, start: u64, end: u64) -> Item {
        Item {
            line,
            system: SystemId::new(7),
            branch: "00000001-01020304".parse().unwrap(),
            range: LsnRange::new(Lsn::new(start * MIB), Lsn::new(end * MIB)),
            id: ObjectId::random(),
            size: 10,
            epoch: EpochId::random(),
            since: Instant::now(),
        }
    }

    fn listed(locations: usize) -> Shelf {
        let mut shelf = Shelf::new(vec![true; locations]);
        (0..locations).for_each(|l| shelf.listed(l, 0, Lsn::new(16 * MIB), &[]));
        (0..locations).for_each(|l| shelf.complete(l, 0, Lsn::new(16 * MIB)));
        shelf
    }

    #[test]
    fn a_frontier_advances_in_order_whatever_the_order_of_the_answers() {
        let mut shelf = listed(2);
        shelf.add(item(0, 16, 32));
        shelf.add(item(0, 32, 48));
        let (first, second) = (shelf.next(0, u64::MAX).unwrap(), shelf.next(0, u64::MAX).unwrap());
        assert!(shelf.next(0, u64::MAX).is_none());
        shelf.sent(0, &second);
        assert_eq!(shelf.frontier(0, 0), Lsn::new(16 * MIB));
        shelf.sent(0, &first);
        assert_eq!(shelf.frontier(0, 0), Lsn::new(48 * MIB));
        assert_eq!(shelf.frontier(1, 0), Lsn::new(16 * MIB), "the other location");
        assert_eq!(shelf.backlog(1).0, 2);
    }

    #[test]
    fn nothing_is_sent_to_a_location_that_was_not_listed() {
        let mut shelf = Shelf::new(vec![true]);
        shelf.add(item(0, 16, 32));
        assert!(shelf.next(0, u64::MAX).is_none());
        assert_eq!(shelf.frontier(0, 0), Lsn::INVALID);
        shelf.listed(0, 0, Lsn::new(16 * MIB), &[]);
        shelf.complete(0, 0, Lsn::new(16 * MIB));
        assert!(shelf.next(0, u64::MAX).is_some());
    }

    #[test]
    fn after_a_restart_only_what_is_missing_is_sent() {
        let mut shelf = Shelf::new(vec![true]);
        let (there, piece, missing) = (item(0, 16, 32), item(0, 32, 34), item(0, 48, 64));
        let span = (LsnRange::new(Lsn::new(32 * MIB), Lsn::new(48 * MIB)), ObjectId::random());
        [&there, &piece, &missing].into_iter().for_each(|i| shelf.add(i.clone()));
        shelf.listed(0, 0, Lsn::new(16 * MIB), &[(there.range, there.id), span]);
        assert_eq!(shelf.next(0, u64::MAX).map(|i| i.id), Some(missing.id));
        assert!(shelf.next(0, u64::MAX).is_none());
        assert_eq!(shelf.frontier(0, 0), Lsn::INVALID, "what precedes the line may be missing");
        assert_eq!(shelf.reach(0, 0), Lsn::new(48 * MIB));
        shelf.complete(0, 0, Lsn::new(16 * MIB));
        assert_eq!(shelf.frontier(0, 0), Lsn::new(48 * MIB));
    }

    #[test]
    fn a_span_replaces_its_pieces() {
        let mut shelf = listed(2);
        let (early, late, span) = (item(0, 16, 18), item(0, 18, 20), item(0, 16, 32));
        shelf.add(early.clone());
        shelf.add(late.clone());
        let sending = shelf.next(0, u64::MAX).unwrap();
        assert_eq!(sending.id, early.id);
        assert!(shelf.sent(0, &sending).is_empty());
        shelf.add(span.clone());
        assert_eq!(
            shelf.next(0, u64::MAX).unwrap().id,
            span.id,
            "the second piece is not sent any more"
        );
        assert_eq!(shelf.next(1, u64::MAX).unwrap().id, span.id);
        assert_eq!(shelf.sent(0, &span), vec![early.name()]);
        assert!(shelf.sent(1, &span).is_empty());
        let gone: Vec<_> = shelf.retire(0, Lsn::INVALID, WithAll).iter().map(|i| i.id).collect();
        assert_eq!(gone, vec![early.id, late.id], "the span waits for the spool");
        assert_eq!(shelf.retire(0, span.range.end, WithAll).len(), 1);
    }

    #[test]
    fn a_piece_is_remembered_until_its_span_is_wherever_the_piece_is() {
        let mut shelf = listed(2);
        let (piece, span) = (item(0, 16, 18), item(0, 16, 32));
        shelf.add(piece.clone());
        for location in 0..2 {
            let sending = shelf.next(location, u64::MAX).unwrap();
            shelf.sent(location, &sending);
        }
        shelf.add(span.clone());
        assert_eq!(shelf.sent(0, &span), vec![piece.name()]);
        assert!(shelf.retire(0, span.range.end, WithAll).is_empty(), "the second location lags");
        assert_eq!(shelf.sent(1, &span), vec![piece.name()]);
        assert_eq!(shelf.retire(0, span.range.end, WithAll).len(), 2);
    }

    #[test]
    fn a_piece_that_may_be_there_is_deleted_too() {
        let span = item(0, 16, 32);
        // The write fails before the span is on the shelf, after it, and after it is stored.
        for failed_after in 0..3 {
            let mut shelf = listed(1);
            let piece = item(0, 16, 18);
            shelf.add(piece.clone());
            let sending = shelf.next(0, u64::MAX).unwrap();
            let mut gone = Vec::new();
            for step in 0..3 {
                if step == failed_after {
                    gone.extend(shelf.failed(0, &sending));
                }
                match step {
                    0 => shelf.add(span.clone()),
                    1 => gone.extend(shelf.sent(0, &span)),
                    _ => {}
                }
            }
            assert_eq!(gone, vec![piece.name()], "{failed_after}");
            assert_eq!(shelf.retire(0, span.range.end, WithAll).len(), 2);
        }
    }

    #[test]
    fn a_piece_that_comes_after_its_span_is_deleted() {
        let mut shelf = listed(1);
        let (piece, span) = (item(0, 16, 18), item(0, 16, 32));
        shelf.add(piece.clone());
        let sending = shelf.next(0, u64::MAX).unwrap();
        shelf.add(span.clone());
        assert!(shelf.sent(0, &span).is_empty());
        assert_eq!(shelf.sent(0, &sending), vec![piece.name()]);
    }

    /// A write takes its time while the server goes on by two spans, as it does at each end of a backup.
    #[test]
    fn a_piece_that_comes_after_its_span_has_left_the_shelf_is_deleted() {
        for fails in [false, true] {
            let mut shelf = listed(1);
            let (piece, span) = (item(0, 16, 18), item(0, 16, 32));
            shelf.add(piece.clone());
            let sending = shelf.next(0, u64::MAX).unwrap();
            shelf.add(span.clone());
            shelf.next(0, u64::MAX).unwrap();
            assert_eq!(shelf.sent(0, &span), []);
            assert_eq!(shelf.retire(0, span.range.end, WithAll), [], "the piece is on its way");
            let gone: Vec<ObjectName> = match fails {
                true => shelf.failed(0, &sending).into_iter().collect(),
                false => shelf.sent(0, &sending),
            };
            assert_eq!(gone, [piece.name()]);
            assert_eq!(shelf.next(0, u64::MAX), None);
            assert_eq!(shelf.retire(0, span.range.end, WithAll).len(), 2);
        }
    }

    #[test]
    fn what_failed_is_sent_again_unless_it_is_superfluous() {
        let mut shelf = listed(1);
        shelf.add(item(0, 16, 18));
        let piece = shelf.next(0, u64::MAX).unwrap();
        shelf.failed(0, &piece);
        assert_eq!(shelf.next(0, u64::MAX).unwrap().id, piece.id);
        shelf.add(item(0, 16, 32));
        shelf.failed(0, &piece);
        assert_ne!(shelf.next(0, u64::MAX).unwrap().id, piece.id);
    }

    #[test]
    fn a_small_object_need_not_wait_for_a_great_one() {
        let mut shelf = listed(1);
        shelf.add(Item { size: 1000, ..item(0, 16, 32) });
        let piece = item(0, 32, 33);
        shelf.add(piece.clone());
        assert_eq!(shelf.next(0, 100).map(|i| i.id), Some(piece.id));
        assert!(shelf.next(0, 100).is_none());
        assert!(shelf.next(0, 1000).is_some());
    }

    #[test]
    fn what_is_given_up_is_not_sent_and_the_rest_is_when_it_was_listed_anew() {
        let mut shelf = listed(2);
        let (old, sending, new) = (item(0, 16, 32), item(0, 32, 48), item(0, 48, 64));
        [&old, &sending, &new].into_iter().for_each(|i| shelf.add(i.clone()));
        for _ in 0..3 {
            let next = shelf.next(0, u64::MAX).unwrap();
            shelf.sent(0, &next);
        }
        assert_eq!(shelf.reach(0, 0), Lsn::new(64 * MIB));
        let first = shelf.next(1, u64::MAX).unwrap();
        shelf.failed(1, &first);
        let gone = shelf.give_up(0, Lsn::new(48 * MIB));
        assert_eq!(gone.iter().map(|i| i.id).collect::<Vec<_>>(), [old.id, sending.id]);
        assert_eq!(shelf.frontier(0, 0), Lsn::new(64 * MIB), "it lacks nothing");
        let begin = Lsn::new(48 * MIB);
        assert!(!shelf.is_listed(1, 0, begin) && shelf.is_listed(0, 0, begin));
        assert!(shelf.next(1, u64::MAX).is_none());
        shelf.listed(1, 0, Lsn::new(48 * MIB), &[]);
        assert_eq!(shelf.next(1, u64::MAX).map(|i| i.id), Some(new.id));
        shelf.sent(1, &new);
        shelf.complete(1, 0, Lsn::new(16 * MIB));
        assert_eq!(
            shelf.frontier(1, 0),
            Lsn::INVALID,
            "it was complete up to where it began before"
        );
        shelf.complete(1, 0, Lsn::new(48 * MIB));
        assert_eq!(shelf.frontier(1, 0), Lsn::new(64 * MIB));
        // What is under way is not taken from under the sender.
        let mut shelf = listed(1);
        shelf.add(old.clone());
        let sending = shelf.next(0, u64::MAX).unwrap();
        assert!(shelf.give_up(0, Lsn::new(48 * MIB)).is_empty());
        shelf.sent(0, &sending);
        assert_eq!(shelf.give_up(0, Lsn::new(48 * MIB)).len(), 1);
    }

    #[test]
    fn what_is_stored_and_forgotten_beside_a_listing_asks_for_another() {
        let mut shelf = listed(1);
        let (old, new) = (item(0, 16, 32), item(0, 32, 48));
        [&old, &new].into_iter().for_each(|i| shelf.add(i.clone()));
        let sending = shelf.next(0, u64::MAX).unwrap();
        let [begin, later] = [16, 32].map(|mib| Lsn::new(mib * MIB));
        // It is being listed, and nothing was found.
        shelf.list_again(0, Lsn::MAX);
        shelf.sent(0, &sending);
        assert_eq!(shelf.retire(0, later, WithAll).len(), 1);
        shelf.listed(0, 0, begin, &[]);
        assert!(!shelf.is_listed(0, 0, later));
        assert!(shelf.next(0, u64::MAX).is_some(), "it gets the rest meanwhile");
        shelf.listed(0, 0, later, &[]);
        assert!(shelf.is_listed(0, 0, later));
    }

    #[test]
    fn groups_of_pieces_go_when_their_span_is_there() {
        let mut shelf = listed(2);
        let items =
            [item(0, 16, 18), item(0, 18, 20), item(0, 16, 20), item(0, 20, 21), item(0, 16, 32)];
        let mut gone = Vec::new();
        for next in &items {
            shelf.add(next.clone());
            // The second location is down.
            let sending = shelf.next(0, u64::MAX).unwrap();
            gone.extend(shelf.sent(0, &sending));
        }
        let names = |items: &[Item]| items.iter().map(Item::name).collect::<Vec<_>>();
        let [a, b, group, c, span] = items;
        let deleted = names(&[a.clone(), b.clone(), a, group, b, c]);
        gone.sort_by_key(ToString::to_string);
        let mut expected = deleted;
        expected.sort_by_key(ToString::to_string);
        assert_eq!(gone, expected, "each when a longer one is stored; twice does no harm");
        assert_eq!(
            shelf.retire(0, Lsn::INVALID, WithAll).len(),
            4,
            "nobody lacks what is in the span"
        );
        assert_eq!(shelf.backlog(1).0, 1, "all that the second will ever get");
        shelf.sent(1, &span);
        assert_eq!(shelf.retire(0, span.range.end, WithAll).len(), 1);
    }

    #[test]
    fn a_later_line_counts_only_when_the_earlier_is_there() {
        let mut shelf = listed(1);
        shelf.add(item(0, 16, 18));
        shelf.add(item(1, 16, 32));
        shelf.listed(0, 1, Lsn::new(16 * MIB), &[]);
        shelf.complete(0, 1, Lsn::new(16 * MIB));
        let (old, new) = (shelf.next(0, u64::MAX).unwrap(), shelf.next(0, u64::MAX).unwrap());
        shelf.sent(0, &new);
        assert_eq!(shelf.frontier(0, 1), Lsn::INVALID);
        shelf.sent(0, &old);
        assert_eq!(shelf.frontier(0, 1), Lsn::new(32 * MIB));
        assert!(shelf.is_line_done(0, WithAll) && shelf.is_line_done(1, WithAll));
    }

    #[test]
    fn a_best_effort_location_is_waited_for_only_while_there_is_room() {
        let mut shelf = Shelf::new(vec![true, false]);
        (0..2).for_each(|l| shelf.listed(l, 0, Lsn::new(16 * MIB), &[]));
        shelf.add(item(0, 16, 32));
        let sent = shelf.next(0, u64::MAX).unwrap();
        shelf.sent(0, &sent);
        let until = Lsn::new(32 * MIB);
        assert_eq!(shelf.retire(0, until, WithAll), []);
        assert!(!shelf.is_line_done(0, WithAll) && shelf.is_line_done(0, WithRequired));
        let on_its_way = shelf.next(1, u64::MAX).unwrap();
        assert_eq!(shelf.retire(0, until, WithRequired), [], "it is being sent");
        shelf.failed(1, &on_its_way);
        assert_eq!(shelf.retire(0, until, WithRequired).len(), 1);
        assert!(shelf.is_listed(0, 0, until));
        assert!(
            !shelf.is_listed(1, 0, Lsn::INVALID),
            "what it missed is found by listing it again"
        );
        assert_eq!(shelf.frontier(1, 0), Lsn::INVALID);
    }

    #[test]
    fn a_required_location_is_always_waited_for() {
        let mut shelf = listed(2);
        shelf.add(item(0, 16, 32));
        let sent = shelf.next(0, u64::MAX).unwrap();
        shelf.sent(0, &sent);
        assert_eq!(shelf.retire(0, Lsn::new(32 * MIB), WithRequired), []);
    }
}
