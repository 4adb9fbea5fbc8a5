//! The listing of all WAL, in parts that are asked for at the same time.
//!
//! A store gives a thousand names in a page, and the next page only after it: a month of a busy database is 200 pages. So
//! the names are cut at borders, and the parts are listed side by side. Any borders will do, for each part is all that lies
//! between two of them: what is stored meanwhile, in a folder that nobody knew of, lies between two as well. Good ones are
//! the folders `<high 32>`, which hold 256 spans each, and two listings by folder find them.

use crate::Result;
use crate::id::SystemId;
use crate::location::{Listed, Location};
use crate::name::folder;
use futures::{StreamExt, TryStreamExt, stream};

/// Listings that are asked for at the same time.
const PARTS_AT_ONCE: usize = 32;
/// As many parts as there are folders, up to here.
const PARTS_MAX: usize = 96;
/// Folders in a part at least: four make a page of whole spans.
const FOLDERS_MIN: usize = 4;

/// All that `location` holds of WAL and its origins, in the order of names.
pub(super) async fn wal(location: &Location, system: SystemId) -> Result<Vec<Listed>> {
    let root = folder::wal(system);
    if location.is_folder() {
        return location.list(&root).await;
    }
    let (mut listed, is_all) = location.list_page(&root).await?;
    if is_all {
        return Ok(listed);
    }
    let from = listed.last().map(|last| last.path.clone()).unwrap_or_default();
    let parts = parts(&from, &borders(location, &root).await?);
    let listings =
        parts.iter().map(|(after, until)| location.list_between(&root, after, until.as_deref()));
    let rest: Vec<Vec<Listed>> =
        stream::iter(listings).buffered(PARTS_AT_ONCE).try_collect().await?;
    listed.extend(rest.into_iter().flatten());
    Ok(listed)
}

/// The folders of all branches.
async fn borders(location: &Location, root: &str) -> Result<Vec<String>> {
    let branches = location.folders(root).await?;
    let folders = branches.iter().map(|branch| location.folders(branch));
    let folders: Vec<Vec<String>> =
        stream::iter(folders).buffered(PARTS_AT_ONCE).try_collect().await?;
    Ok(folders.concat())
}

/// What lies after `from`, cut at some of `borders` (sorted): each part is what lies after its first name, and up to its
/// second.
fn parts(from: &str, borders: &[String]) -> Vec<(String, Option<String>)> {
    let ahead = &borders[borders.partition_point(|border| border.as_str() <= from)..];
    let step = ahead.len().div_ceil(PARTS_MAX).max(FOLDERS_MIN);
    let mut starts = vec![from.to_string()];
    starts.extend(ahead.iter().step_by(step).cloned());
    let ends: Vec<Option<String>> = starts[1..].iter().cloned().map(Some).chain([None]).collect();
    starts.into_iter().zip(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_name_is_in_one_part(
            names in proptest::collection::btree_set("[a-d]{1,4}", 1..200),
            borders in proptest::collection::btree_set("[a-d]{1,4}", 0..400),
            from in "[a-d]{0,4}",
        ) {
            let borders: Vec<String> = borders.into_iter().collect();
            let parts = parts(&from, &borders);
            for name in names.iter().filter(|name| **name > from) {
                let holds = |(after, until): &&(String, Option<String>)| {
                    name > after && until.as_ref().is_none_or(|until| name <= until)
                };
                prop_assert_eq!(parts.iter().filter(holds).count(), 1, "{}", name);
            }
            prop_assert!(parts.len() <= PARTS_MAX + 1);
        }
    }
}
