//! When WAL is cut into an object. Pure: a clock is passed in.
//!
//! A span is cut when it is full, and that is not decided here but by position. A piece is cut early, so that
//! WAL does not wait for its span: when the oldest byte that is in no object is `flush_interval` old; or, where
//! locations and not the spool acknowledge, as soon as a commit waits, but never two within
//! [`COMMIT_PAUSE`]; or at once when the server is about to leave. Only one piece waits to be sealed at a time,
//! so that a slow sealer gets greater pieces, not more.
//!
//! Commits that wait make many small pieces. After [`GROUP_PIECES`] of them their whole range is cut once more, as one longer
//! piece that supersedes them: so a span has never more than some hundreds of objects, however long it takes to
//! fill, and a location that was away gets those and not thousands.

use backstay_common::config::{Acknowledge, DurabilitySettings};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::pgtime::PgTime;
use backstay_common::wal::{Decoder, Summary};
use std::time::{Duration, Instant};

/// Between two pieces that are cut for commits.
pub const COMMIT_PAUSE: Duration = Duration::from_millis(5);

/// So many pieces in a row are cut once more, as one.
pub const GROUP_PIECES: u32 = 256;

/// Commits behind a span's border wait for the rest of the span. It goes ahead as a piece if it is no longer than this;
/// else the span itself is hardly slower.
pub const TAIL_BYTES_MAX: u64 = 1 << 20;

/// A commit that is further than this behind the server's end is not cut for: the next span is due at once.
pub const BEHIND_BYTES: u64 = 16 << 20;

/// A run of WAL that shall become an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    pub range: LsnRange,
    pub summary: Summary,
    /// What the server's clock showed when it had no WAL beyond the range.
    pub clock: Option<PgTime>,
    /// It holds nothing that commits wait for: it is a whole span, or pieces in one.
    pub is_patient: bool,
}

/// Pieces in a row that are in no longer object yet.
#[derive(Debug)]
pub struct Group {
    from: Lsn,
    pub pieces: u32,
    /// Of the records that end in them.
    pub summary: Summary,
    pub first_record: Option<Lsn>,
}

impl Group {
    /// None yet; the first will begin at `from`.
    pub fn from(from: Lsn) -> Group {
        Group { from, pieces: 0, summary: Summary::default(), first_record: None }
    }

    /// All of them as one, up to `end`, which `decoder` has reached.
    pub fn cut(self, end: Lsn, decoder: &Decoder, clock: Option<PgTime>) -> Cut {
        let mut summary = self.summary;
        summary.first_record = self.first_record;
        if summary.first_record.is_some() {
            summary.last_record = decoder.last_record();
            summary.last_record_end = Some(decoder.record_end());
        }
        Cut { range: LsnRange::new(self.from, end), summary, clock, is_patient: true }
    }
}

/// What the settings say about pieces.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    flush_interval: Duration,
    /// Commits wait for locations.
    pub commits_wait: bool,
}

impl Rules {
    pub fn new(settings: &DurabilitySettings) -> Rules {
        Rules {
            flush_interval: settings.flush_interval,
            commits_wait: settings.acknowledge != Acknowledge::Spool,
        }
    }

    /// The same where no commit is cut for.
    pub fn without_commits(self) -> Rules {
        Rules { commits_wait: false, ..self }
    }
}

/// What is known of the bytes that are in no object yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uncut {
    /// When the oldest of them came; none if there are none.
    oldest: Option<Instant>,
    /// A commit is among them.
    commit: bool,
    urgent: bool,
    last_piece: Option<Instant>,
}

impl Uncut {
    /// Bytes have come.
    pub fn arrive(&mut self, now: Instant) {
        self.oldest.get_or_insert(now);
    }

    /// Among them a commit.
    pub fn commit(&mut self) {
        self.commit = true;
    }

    /// Whatever is there shall be cut at once.
    pub fn urge(&mut self) {
        self.urgent = true;
    }

    /// All of them are in an object now.
    pub fn cut(&mut self, now: Instant) {
        *self = Uncut { last_piece: Some(now), ..Uncut::default() };
    }

    /// When a piece is due; none if nothing waits.
    pub fn due(&self, rules: &Rules) -> Option<Instant> {
        let oldest = self.oldest?;
        if self.urgent {
            return Some(oldest);
        }
        let aged = oldest + rules.flush_interval;
        if !(rules.commits_wait && self.commit) {
            return Some(aged);
        }
        let paused = self.last_piece.map_or(oldest, |last| last + COMMIT_PAUSE);
        Some(aged.min(paused.max(oldest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::config::OnSpoolFull;

    fn rules(acknowledge: Acknowledge) -> Rules {
        let flush_interval = Duration::from_secs(5);
        let on_spool_full = OnSpoolFull::Hold;
        Rules::new(&DurabilitySettings { acknowledge, flush_interval, on_spool_full })
    }

    #[test]
    fn nothing_is_cut_where_nothing_waits() {
        let mut uncut = Uncut::default();
        uncut.urge();
        assert_eq!(uncut.due(&rules(Acknowledge::All)), None);
        let now = Instant::now();
        uncut.arrive(now);
        uncut.cut(now);
        assert_eq!(uncut.due(&rules(Acknowledge::All)), None);
    }

    #[test]
    fn the_oldest_byte_sets_the_time() {
        let start = Instant::now();
        let mut uncut = Uncut::default();
        uncut.arrive(start);
        uncut.arrive(start + Duration::from_secs(3));
        uncut.commit();
        assert_eq!(uncut.due(&rules(Acknowledge::Spool)), Some(start + Duration::from_secs(5)));
    }

    #[test]
    fn a_commit_that_waits_for_locations_is_cut_at_once_but_not_too_often() {
        let rules = rules(Acknowledge::Any);
        let start = Instant::now();
        let mut uncut = Uncut::default();
        uncut.arrive(start);
        assert_eq!(uncut.due(&rules), Some(start + Duration::from_secs(5)));
        uncut.commit();
        assert_eq!(uncut.due(&rules), Some(start));
        uncut.cut(start);
        let soon = start + Duration::from_millis(1);
        uncut.arrive(soon);
        uncut.commit();
        assert_eq!(uncut.due(&rules), Some(start + COMMIT_PAUSE));
    }

    #[test]
    fn a_server_that_leaves_does_not_wait() {
        let start = Instant::now();
        let mut uncut = Uncut::default();
        uncut.arrive(start);
        uncut.urge();
        assert_eq!(uncut.due(&rules(Acknowledge::Spool)), Some(start));
    }
}
