//! Keeps the house tidy: what the layout promises, asserted over the tree.

use std::path::{Path, PathBuf};

/// A room that is longer without its tests wants to be two.
const LINES_MAX: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace is there")
}

/// All Rust files of the workspace.
fn sources() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        ["common", "agent", "restore", "tests", "benches"].map(|name| root().join(name)).into();
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a readable tree") {
            let path = entry.expect("a readable tree").path();
            if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    assert!(files.len() > 50, "the tree was found");
    files
}

#[test]
fn the_two_programs_never_import_each_other() {
    let manifest =
        |name: &str| std::fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
    assert!(!manifest("agent").contains("\nbackstay.workspace"));
    assert!(!manifest("agent").contains("\nbackstay ="));
    assert!(!manifest("restore").contains("\nbackstay-agent"));
    for name in ["\nbackstay.", "\nbackstay ", "\nbackstay-agent", "\nbackstay-tests"] {
        assert!(!manifest("common").contains(name), "common stands below all others");
    }
}

#[test]
fn rooms_have_a_purpose_and_a_human_size() {
    for path in sources() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let banned = ["mod.rs", "utils.rs", "util.rs", "helpers.rs", "types.rs"];
        assert!(!banned.contains(&name.as_str()), "{}: name it by what it does", path.display());
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap().lines().count();
        assert!(code <= LINES_MAX || name == "tests.rs", "{}: {code} lines", path.display());
    }
}

#[test]
fn every_module_says_what_it_is() {
    for path in sources() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let first = text.lines().next().unwrap_or_default();
        let documented = first.starts_with("//!") || first.starts_with("#![doc");
        assert!(documented || name == "tests.rs", "{} begins without //!", path.display());
    }
}

#[test]
fn nothing_unfinished_is_left() {
    let marks = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
    ];
    for path in sources() {
        let text = std::fs::read_to_string(&path).unwrap();
        for mark in marks {
            assert!(!text.contains(mark), "{} contains {mark}", path.display());
        }
    }
}
