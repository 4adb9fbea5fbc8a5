//! Pages that are damaged in the database: which of them are new, and how people are told.

use crate::alarms::Alarms;
use backstay_common::id::SnapshotId;
use backstay_common::snapshot::{CorruptPage, Manifest, Root};
use std::collections::{BTreeMap, BTreeSet};

/// More alarms than this about damaged files help nobody.
const ALARMS_MAX: usize = 100;
/// Runs of blocks that an alarm names.
const RANGES_MAX: usize = 20;

/// How many of the damaged pages of `manifest` are not among those of its parent; None if it has none, or if one of the two
/// does not name all of its own.
pub fn new_pages(manifest: &Manifest, parent: Option<&[CorruptPage]>) -> Option<u64> {
    let place = |page: &CorruptPage| (page.path.clone(), page.block);
    let known: BTreeSet<_> = parent?.iter().map(place).collect();
    let damaged = manifest.all_corrupt_pages().filter(|damaged| !damaged.is_empty())?;
    Some(damaged.iter().filter(|page| !known.contains(&place(page))).count() as u64)
}

/// Alarms for files with damaged pages, and the end of those for files that are whole again.
pub fn report(alarms: &Alarms, snapshot: SnapshotId, root: &Root) {
    let mut files: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    for page in &root.corrupt_pages {
        files.entry(&page.path).or_default().insert(page.block);
    }
    for alarm in alarms.list() {
        if alarm.name == "page-corrupt" && !files.contains_key(alarm.subject.as_str()) {
            alarms.clear("page-corrupt", &alarm.subject);
        }
    }
    for (path, blocks) in files.iter().take(ALARMS_MAX) {
        let (what, them) = match blocks.len() {
            1 => ("block", "fails its checksum"),
            _ => ("blocks", "fail their checksums"),
        };
        let blocks = ranges(blocks);
        let reason =
            format!("{path}: {what} {blocks} {them}; snapshot {snapshot} has what is there");
        alarms.raise("page-corrupt", path, reason);
    }
    let untold: usize = files.values().skip(ALARMS_MAX).map(BTreeSet::len).sum();
    if untold > 0 {
        tracing::error!("{untold} more damaged pages are named in the manifest");
    }
}

/// "3, 7-9, 12 and 40 more".
fn ranges(blocks: &BTreeSet<u32>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &block in blocks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == block => *last = block,
            _ => runs.push((block, block)),
        }
    }
    let word = |&(first, last): &(u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let named: Vec<String> = runs.iter().take(RANGES_MAX).map(word).collect();
    let blocks_of = |(first, last): &(u32, u32)| u64::from(last - first) + 1;
    match runs.iter().skip(RANGES_MAX).map(blocks_of).sum::<u64>() {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::id::SystemId;
    use backstay_common::snapshot::{ManifestPlain, Root, testing};

    fn pages(places: &[(&str, u32)]) -> Vec<CorruptPage> {
        let page = |&(path, block): &(&str, u32)| CorruptPage { path: path.into(), block };
        places.iter().map(page).collect()
    }

    fn manifest(corrupt_pages: u64, named: &[(&str, u32)]) -> Manifest {
        let id = "20261122T020000Z-1f2e3d4c".parse().unwrap();
        let branch = "00000001-01020304".parse().unwrap();
        let plain = testing::plain(SystemId::new(7), id, branch);
        let plain = ManifestPlain { corrupt_pages, ..plain };
        Manifest { plain, root: Root { corrupt_pages: pages(named), ..testing::root() } }
    }

    #[test]
    fn only_pages_that_the_parent_does_not_name_are_new() {
        let two = manifest(2, &[("base/1", 3), ("base/1", 4)]);
        let of = |parent: &[(&str, u32)]| new_pages(&two, Some(&pages(parent)));
        assert_eq!(of(&[]), Some(2));
        assert_eq!(of(&[("base/1", 4), ("base/2", 3)]), Some(1));
        assert_eq!(of(&[("base/1", 3), ("base/1", 4), ("base/1", 5)]), Some(0));
        assert_eq!(new_pages(&two, None), None, "no parent, or not all of its own are named");
        assert_eq!(new_pages(&manifest(0, &[]), Some(&[])), None);
        assert_eq!(new_pages(&manifest(3, &[("base/1", 3)]), Some(&[])), None, "cut off");
    }

    #[test]
    fn blocks_are_named_as_ranges() {
        let named = |blocks: &[u32]| ranges(&blocks.iter().copied().collect());
        assert_eq!(named(&[3]), "3");
        assert_eq!(named(&[12, 7, 9, 3, 8]), "3, 7-9, 12");
        assert_eq!(named(&[u32::MAX - 1, u32::MAX]), "4294967294-4294967295");
        let odd: Vec<u32> = (0..20).map(|n| 2 * n + 1).collect();
        assert!(named(&odd).ends_with("37, 39"), "{}", named(&odd));
        let more: Vec<u32> = odd.into_iter().chain(50..90).collect();
        assert!(named(&more).ends_with("37, 39 and 40 more"), "{}", named(&more));
    }

    #[test]
    fn each_file_has_one_alarm_that_names_its_blocks() {
        let (alarms, id) = (Alarms::default(), "20261122T020000Z-1f2e3d4c".parse().unwrap());
        // Those that were judged at the end come last.
        let first = manifest(3, &[("base/1", 4), ("base/2", 3), ("base/1", 3)]).root;
        report(&alarms, id, &first);
        let told: Vec<String> = alarms.list().into_iter().map(|alarm| alarm.message).collect();
        assert_eq!(told.len(), 2);
        assert!(told[0].starts_with("base/1: blocks 3-4 fail their checksums;"), "{told:?}");
        assert!(told[1].starts_with("base/2: block 3 fails its checksum;"), "{told:?}");
        report(&alarms, id, &manifest(1, &[("base/2", 3)]).root);
        assert_eq!(alarms.list().len(), 1);
    }
}
