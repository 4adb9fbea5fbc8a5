//! What a location in a folder holds, seen from outside, and how to damage it.

use anyhow::{Context, Result, bail, ensure};
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Names and digests of all objects. What is being written just now is not one yet.
pub fn objects(root: &Path) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for path in files(root)? {
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        if name.parse::<ObjectName>().is_err() {
            continue;
        }
        match std::fs::read(&path) {
            Ok(bytes) => found.insert(name, digest(&bytes)),
            // A superseded piece may go while we look.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
    }
    Ok(found)
}

/// FNV-1a, eight bytes at a time: nobody here forges objects.
fn digest(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(bytes.len() as u64 ^ 0xcbf2_9ce4_8422_2325, |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3).rotate_left(29)
    })
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => dirs.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    Ok(found)
}

/// No name may have two contents, at any time. `cluster` is made by `init`, for each location by itself.
pub fn no_name_has_two_contents(one: &Path, other: &Path) -> Result<()> {
    let (one, other) = (objects(one)?, objects(other)?);
    for (name, digest) in one.iter().filter(|(name, _)| *name != "cluster") {
        let differs = other.get(name).is_some_and(|theirs| theirs != digest);
        ensure!(!differs, "{name} has two contents");
    }
    Ok(())
}

/// Waits until two locations hold the same objects, but for what prune and restores keep at each by itself.
pub async fn wait_until_equal(one: &Path, other: &Path, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        no_name_has_two_contents(one, other)?;
        let (mine, theirs) = (objects(one)?, objects(other)?);
        let lacks = |a: &BTreeMap<String, u64>, b: &BTreeMap<String, u64>| {
            let of_one = |name: &&String| name.contains("/condemned/") || name.contains("/pins/");
            let lacks = a.keys().filter(|name| !b.contains_key(*name) && !of_one(name));
            lacks.cloned().collect::<Vec<_>>()
        };
        let (first, second) = (lacks(&mine, &theirs), lacks(&theirs, &mine));
        if first.is_empty() && second.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "not equal after {patience:?}: only in {}: {first:?}; only in {}: {second:?}",
                one.display(),
                other.display()
            );
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The WAL of each branch is one piece without a hole; where each ends.
pub fn wal_without_holes(root: &Path) -> Result<BTreeMap<String, LsnRange>> {
    let names: Vec<String> = objects(root)?.into_keys().collect();
    let mut ranges: BTreeMap<Branch, Vec<LsnRange>> = BTreeMap::new();
    for name in &names {
        if let Ok(ObjectName::Wal { branch, range, .. }) = name.parse() {
            ranges.entry(branch).or_default().push(range);
        }
    }
    ensure!(!ranges.is_empty(), "no WAL in {}", root.display());
    let mut found = BTreeMap::new();
    for (branch, mut ranges) in ranges {
        ranges.sort_by_key(|range| range.start);
        let (start, mut end): (Lsn, Lsn) = (ranges[0].start, ranges[0].end);
        for range in &ranges {
            ensure!(
                range.start <= end,
                "{}: branch {branch} lacks {end} to {}",
                root.display(),
                range.start
            );
            end = end.max(range.end);
        }
        found.insert(branch.to_string(), LsnRange::new(start, end));
    }
    Ok(found)
}

/// A location's disk is unmounted: the folder goes elsewhere.
pub fn unmount(location: &Path, away: &Path) -> Result<()> {
    std::fs::rename(location, away).with_context(|| format!("move {}", location.display()))
}

/// It is mounted again. What a write under way has left in its place goes.
pub fn mount_again(away: &Path, location: &Path) -> Result<()> {
    let _ = std::fs::remove_dir_all(location);
    std::fs::rename(away, location).with_context(|| format!("move to {}", location.display()))
}

/// The names of objects whose name contains this, in order.
pub fn named(root: &Path, part: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for path in files(root)? {
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        if name.contains(part) && name.parse::<ObjectName>().is_ok() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A copy of a location, for damage.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    for _ in 0..20 {
        let _ = std::fs::remove_dir_all(to);
        let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status()?;
        // Else something went that was there when the folder was listed.
        if copied.success() {
            return Ok(());
        }
    }
    bail!("cp of {} failed", from.display())
}
