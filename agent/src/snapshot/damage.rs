//! Pages that are damaged in the database: which of them are new.

use backstay_common::snapshot::{CorruptPage, Manifest};
use std::collections::BTreeSet;

/// How many of the damaged pages of `manifest` are not among those of its parent; None if it has none, or if one of the two
/// does not name all of its own.
pub fn new_pages(manifest: &Manifest, parent: Option<&[CorruptPage]>) -> Option<u64> {
    let place = |page: &CorruptPage| (page.path.clone(), page.block);
    let known: BTreeSet<_> = parent?.iter().map(place).collect();
    let damaged = manifest.all_corrupt_pages().filter(|damaged| !damaged.is_empty())?;
    Some(damaged.iter().filter(|page| !known.contains(&place(page))).count() as u64)
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
}
