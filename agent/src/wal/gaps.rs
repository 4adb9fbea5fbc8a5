//! Gaps that this agent met: kept in the spool, and told to every location.
//!
//! `gaps/<number>.json` is written and fsynced before the stream goes on behind the gap. As soon as the branch is known it is
//! sealed, once, as `<number>.sealed`, and put to every location; when all have it the first becomes `<number>.told`, and the
//! second goes. A crash repeats the step that it interrupted: equal bytes under an equal name.

use super::WalPath;
use super::board::LastGap;
use crate::durable::{self, sync_folder};
use backstay_common::gap::{Cause, Gap};
use backstay_common::id::Branch;
use backstay_common::ledger::Event;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::seal::Header;
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_secs(15);

/// A gap as the spool keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    pub start: Lsn,
    pub end: Lsn,
    pub cause: Cause,
    pub detail: String,
    pub noticed: jiff::Timestamp,
    /// Of which line; its branch may not be known yet.
    pub line: u32,
    pub branch: Option<Branch>,
}

impl Kept {
    pub fn in_short(&self) -> LastGap {
        let range = LsnRange::new(self.start, self.end);
        LastGap { range, is_lost: self.cause != Cause::Diverged, branch: self.branch }
    }
}

/// The folder `gaps` of a spool. All methods block.
#[derive(Clone, Debug)]
pub struct Gaps {
    folder: PathBuf,
}

impl Gaps {
    pub fn create(root: &Path) -> Result<Gaps> {
        let folder = root.join("gaps");
        if folder.is_file() {
            // Version 0.1 kept a list here that only people read.
            let list = root.join("gaps-before");
            std::fs::rename(&folder, &list).context(format!("rename {}", folder.display()))?;
        }
        std::fs::create_dir_all(&folder)
            .and_then(|()| sync_folder(root))
            .context(format!("create {}", folder.display()))?;
        Ok(Gaps { folder })
    }

    /// Keeps a gap, durably.
    pub fn keep(&self, kept: &Kept) -> Result<()> {
        let number = self.numbers()?.last().map_or(1, |(number, _)| number + 1);
        let text = serde_json::to_vec(kept).map_err(|e| Error::new(Kind::Bug, e))?;
        Gaps::write(&self.path(number, "json"), &text)
    }

    /// The last gap that was met, told or not.
    pub fn last(&self) -> Result<Option<Kept>> {
        let Some((number, is_told)) = self.numbers()?.pop() else { return Ok(None) };
        self.read(number, is_told).map(Some)
    }

    /// All that were met, told or not.
    pub fn all(&self) -> Result<Vec<Kept>> {
        let numbers = self.numbers()?.into_iter();
        numbers.map(|(number, is_told)| self.read(number, is_told)).collect()
    }

    /// In their order, and whether every location has been told.
    fn numbers(&self) -> Result<Vec<(u32, bool)>> {
        let doing = || format!("read {}", self.folder.display());
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.folder).context(doing())? {
            let name = entry.context(doing())?.file_name().to_string_lossy().into_owned();
            let Some((number, kind)) = name.split_once('.') else { continue };
            if let (Ok(number), "json" | "told") = (number.parse(), kind) {
                numbers.push((number, kind == "told"));
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn read(&self, number: u32, is_told: bool) -> Result<Kept> {
        let path = self.path(number, if is_told { "told" } else { "json" });
        let text = std::fs::read(&path).context(format!("read {}", path.display()))?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::new(Kind::Corrupt, format!("{}: {e}", path.display())))
    }

    fn path(&self, number: u32, kind: &str) -> PathBuf {
        self.folder.join(format!("{number:06}.{kind}"))
    }

    fn write(path: &Path, bytes: &[u8]) -> Result<()> {
        durable::write(path, bytes).context(format!("write {}", path.display()))
    }

    /// The object under its name: the file's first line.
    fn sealed(&self, number: u32) -> Result<Option<(ObjectName, Bytes)>> {
        let path = self.path(number, "sealed");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(format!("read {}", path.display())),
        };
        let end = bytes.iter().position(|&byte| byte == b'\n').unwrap_or(bytes.len());
        let name = String::from_utf8_lossy(&bytes[..end]).parse::<ObjectName>();
        let name =
            name.map_err(|e| Error::new(Kind::Corrupt, format!("{}: {e}", path.display())))?;
        Ok(Some((name, bytes.slice((end + 1).min(bytes.len())..))))
    }

    fn keep_sealed(&self, number: u32, name: &ObjectName, bytes: &[u8]) -> Result<()> {
        let line = format!("{name}\n");
        Gaps::write(&self.path(number, "sealed"), &[line.as_bytes(), bytes].concat())
    }

    fn told(&self, number: u32) -> Result<()> {
        let told = || -> std::io::Result<()> {
            std::fs::rename(self.path(number, "json"), self.path(number, "told"))?;
            std::fs::remove_file(self.path(number, "sealed"))?;
            sync_folder(&self.folder)
        };
        told().context(format!("mark gap {number} as told"))
    }
}

/// Tells every location of every gap. Safe to drop.
pub async fn tell(path: Arc<WalPath>) -> Result<()> {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let gaps = path.gaps.clone();
        let numbers = super::blocking(move || gaps.numbers()).await?;
        for (number, _) in numbers.into_iter().filter(|(_, is_told)| !is_told) {
            match tell_one(&path, number).await {
                Ok(()) => {}
                Err(error) if error.kind() == Kind::Local => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, number, "not every location knows of a gap yet");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

async fn tell_one(path: &Arc<WalPath>, number: u32) -> Result<()> {
    let gaps = path.gaps.clone();
    let (name, bytes) = match super::blocking(move || gaps.sealed(number)).await? {
        Some(sealed) => sealed,
        None => match seal(path, number).await? {
            Some(sealed) => sealed,
            None => return Ok(()),
        },
    };
    let epoch = Header::check(&bytes, &name)?.epoch();
    let puts = path.context.writers.iter().map(|writer| writer.put(&name, epoch, bytes.clone()));
    for put in futures::future::join_all(puts).await {
        put?;
    }
    let gaps = path.gaps.clone();
    super::blocking(move || gaps.told(number)).await
}

/// `None` as long as the branch is not known.
async fn seal(path: &Arc<WalPath>, number: u32) -> Result<Option<(ObjectName, Bytes)>> {
    let gaps = path.gaps.clone();
    let kept = super::blocking(move || gaps.read(number, false)).await?;
    let of_line = || path.board.read(|state| state.lines.get(&kept.line)?.branch());
    let Some(branch) = kept.branch.or_else(of_line) else { return Ok(None) };
    let gap = Gap {
        branch,
        start: kept.start,
        end: kept.end,
        cause: kept.cause.word().to_string(),
        agent: path.context.settings.agent.clone(),
        noticed: kept.noticed.as_second(),
        detail: kept.detail,
    };
    let epoch = path.context.epochs.current().await?;
    let sealed = gap.seal(&epoch, path.context.system);
    let (gaps, name, bytes) = (path.gaps.clone(), sealed.name.clone(), sealed.bytes.clone());
    super::blocking(move || gaps.keep_sealed(number, &name, &bytes)).await?;
    Ok(Some((sealed.name, sealed.bytes)))
}

impl WalPath {
    /// Keeps a gap of the current line, durably, and raises the alarm. Blocks for moments.
    pub fn record_gap(
        &self,
        gap: LsnRange,
        cause: Cause,
        branch: Option<Branch>,
        detail: String,
    ) -> Result<()> {
        let (line, of_line) = self.board.read(|state| {
            (state.current, state.lines.get(&state.current).and_then(|line| line.branch()))
        });
        self.record_gap_of(line, branch.or(of_line), gap, cause, detail)
    }

    /// The same of any line.
    pub fn record_gap_of(
        &self,
        line: u32,
        branch: Option<Branch>,
        LsnRange { start, end }: LsnRange,
        cause: Cause,
        detail: String,
    ) -> Result<()> {
        let alarm = if cause == Cause::Diverged { "wal-diverged" } else { "wal-gap" };
        self.context.alarms.raise(alarm, "", &detail);
        let noticed = jiff::Timestamp::now();
        let kept = Kept { start, end, cause, detail, noticed, line, branch };
        let of = kept.branch.map_or("a new branch".to_string(), |branch| branch.to_string());
        // After a crash it may be told twice.
        self.context.tell(Event::Gap, of, format!("{start}..{end}: {}", kept.detail));
        self.gaps.keep(&kept)?;
        self.board.update(|state| state.server.gap = Some(kept.in_short()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_kept_in_their_order_until_they_are_told_and_after() {
        let root = tempfile::tempdir().unwrap();
        let gaps = Gaps::create(root.path()).unwrap();
        assert_eq!(gaps.last().unwrap(), None);
        let kept = |end: u64| Kept {
            start: Lsn::new(1),
            end: Lsn::new(end),
            cause: Cause::Removed,
            detail: "gone".into(),
            noticed: jiff::Timestamp::UNIX_EPOCH,
            line: 1,
            branch: None,
        };
        gaps.keep(&kept(10)).unwrap();
        gaps.keep(&kept(5)).unwrap();
        let name = ObjectName::Cluster;
        gaps.keep_sealed(2, &name, b"a\nb").unwrap();
        assert_eq!(gaps.sealed(2).unwrap(), Some((name, Bytes::from_static(b"a\nb"))));
        gaps.told(2).unwrap();
        let again = Gaps::create(root.path()).unwrap();
        assert_eq!(again.numbers().unwrap(), [(1, false), (2, true)]);
        assert_eq!(again.last().unwrap(), Some(kept(5)), "the last met, not the furthest");
        assert_eq!(again.sealed(2).unwrap(), None);
        gaps.keep(&kept(20)).unwrap();
        assert_eq!(again.read(3, false).unwrap(), kept(20));
    }
}
