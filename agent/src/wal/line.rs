//! A line: one run of WAL without a hole, as one timeline had it.
//!
//! A new line begins at a timeline switch, behind a gap, and when nothing is spooled. Its folder says what it is:
//! `<TLI>.<number>`, or `<TLI>-<branch>.<number>` once its branch is chosen; the files `history` and `first-record` in it
//! tell from what to choose. The greatest number is the line that was received last.
//!
//! A crash while a line is being made leaves a folder without WAL, which the next start removes.

use super::cut::Cut;
use super::spool::Spool;
use crate::durable::sync_folder;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::origin::Beginnings;
use backstay_common::segment::TimelineId;
use backstay_common::{Context, Result};
use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use tokio::sync::watch;

#[derive(Debug)]
pub struct Line {
    pub number: u32,
    pub beginnings: Beginnings,
    pub spool: Spool,
    branch: watch::Sender<Option<Branch>>,
    /// Pieces, and what is patient.
    lanes: [Mutex<Lane>; 2],
    /// Nothing will be added any more.
    ended: AtomicBool,
}

/// Cuts that wait to be sealed.
#[derive(Debug, Default)]
struct Lane {
    cuts: VecDeque<Cut>,
    /// Those that are not on the shelf yet, waiting or taken.
    unsealed: Vec<LsnRange>,
}

impl Line {
    /// Makes the folder of a new line, durably. Blocks.
    pub fn create(root: &Path, number: u32, beginnings: Beginnings, begin: Lsn) -> Result<Line> {
        let folder = root.join(format!("{:08X}.{number:04}", beginnings.timeline.get()));
        let write = || -> std::io::Result<()> {
            std::fs::create_dir(&folder)?;
            let parts =
                [("history", &beginnings.history), ("first-record", &beginnings.first_record)];
            for (name, bytes) in parts {
                if let Some(bytes) = bytes {
                    let mut file = std::fs::File::create_new(folder.join(name))?;
                    file.write_all(bytes)?;
                    file.sync_all()?;
                }
            }
            sync_folder(root)
        };
        write().context(format!("create {}", folder.display()))?;
        let spool = Spool::create(folder, begin)?;
        Ok(Line::new(number, beginnings, spool, None))
    }

    /// All lines that are in `root`, oldest first. Blocks.
    pub fn open_all(root: &Path) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        let doing = || format!("read {}", root.display());
        for entry in std::fs::read_dir(root).context(doing())? {
            let folder = entry.context(doing())?.path();
            if let Some((timeline, branch, number)) = parse_folder(&folder) {
                lines.extend(Line::open(folder, timeline, branch, number)?);
            }
        }
        lines.sort_by_key(|line| line.number);
        Ok(lines)
    }

    fn open(
        folder: PathBuf,
        timeline: TimelineId,
        branch: Option<Branch>,
        number: u32,
    ) -> Result<Option<Line>> {
        let Some(spool) = Spool::open(folder.clone())? else {
            std::fs::remove_dir_all(&folder).context(format!("remove {}", folder.display()))?;
            return Ok(None);
        };
        let part = |name: &str| match std::fs::read(folder.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context(format!("read {name} in {}", folder.display())),
        };
        let (history, first_record) = (part("history")?, part("first-record")?);
        let beginnings = Beginnings { timeline, history, first_record };
        Ok(Some(Line::new(number, beginnings, spool, branch)))
    }

    fn new(number: u32, beginnings: Beginnings, spool: Spool, branch: Option<Branch>) -> Line {
        Line {
            number,
            beginnings,
            spool,
            branch: watch::Sender::new(branch),
            lanes: Default::default(),
            ended: AtomicBool::new(false),
        }
    }

    pub fn timeline(&self) -> TimelineId {
        self.beginnings.timeline
    }

    pub fn branch(&self) -> Option<Branch> {
        *self.branch.borrow()
    }

    /// Gives the line its branch, durably. Blocks.
    pub fn settle(&self, branch: Branch) -> Result<()> {
        self.spool.settle(branch)?;
        self.branch.send_replace(Some(branch));
        Ok(())
    }

    fn lane(&self, is_patient: bool) -> MutexGuard<'_, Lane> {
        self.lanes[usize::from(is_patient)].lock().expect("no panic while held")
    }

    pub fn push_cut(&self, cut: Cut) {
        let mut lane = self.lane(cut.is_patient);
        lane.unsealed.push(cut.range);
        lane.cuts.push_back(cut);
    }

    /// The next piece, or the next cut that is patient: they are sealed beside each other.
    pub fn pop_cut(&self, is_patient: bool) -> Option<Cut> {
        self.lane(is_patient).cuts.pop_front()
    }

    /// A cut that was taken is on the shelf.
    pub fn cut_is_sealed(&self, cut: &Cut) {
        self.lane(cut.is_patient).unsealed.retain(|range| *range != cut.range);
    }

    /// True if every cut is on the shelf.
    pub fn is_sealed(&self) -> bool {
        self.pieces_are_sealed() && self.lane(true).unsealed.is_empty()
    }

    /// True if every piece is on the shelf.
    pub fn pieces_are_sealed(&self) -> bool {
        self.lane(false).unsealed.is_empty()
    }

    /// From where on sealing still reads the spool.
    pub fn unsealed_from(&self) -> Option<Lsn> {
        let first =
            |lane: MutexGuard<'_, Lane>| lane.unsealed.iter().map(|range| range.start).min();
        first(self.lane(false)).into_iter().chain(first(self.lane(true))).min()
    }

    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

fn parse_folder(folder: &Path) -> Option<(TimelineId, Option<Branch>, u32)> {
    let name = folder.file_name()?.to_str()?;
    let (what, number) = name.split_once('.')?;
    let number = number.parse().ok()?;
    if let Ok(branch) = what.parse::<Branch>() {
        return Some((branch.timeline, Some(branch), number));
    }
    let timeline = u32::from_str_radix(what, 16).ok().filter(|_| what.len() == 8)?;
    Some((TimelineId::new(timeline)?, None, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_again_in_their_order() {
        let root = tempfile::tempdir().unwrap();
        let first = Beginnings::of_first_timeline();
        let second = Beginnings {
            timeline: TimelineId::new(2).unwrap(),
            history: Some(b"1\t0/2000148\twhy\n".to_vec()),
            first_record: Some(vec![1, 2, 3]),
        };
        Line::create(root.path(), 1, first.clone(), Lsn::new(1 << 24)).unwrap();
        let line = Line::create(root.path(), 2, second.clone(), Lsn::new(2 << 24)).unwrap();
        let branch = "00000002-01020304".parse().unwrap();
        line.settle(branch).unwrap();
        std::fs::create_dir(root.path().join("00000003.0003")).unwrap();
        std::fs::create_dir(root.path().join("sealed")).unwrap();
        let lines = Line::open_all(root.path()).unwrap();
        assert_eq!(lines.len(), 2, "a folder without WAL is no line");
        assert_eq!((&lines[0].beginnings, lines[0].branch()), (&first, None));
        assert_eq!((&lines[1].beginnings, lines[1].branch()), (&second, Some(branch)));
        assert!(!root.path().join("00000003.0003").exists());
    }
}
