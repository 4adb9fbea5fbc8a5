//! What belongs into a snapshot, by name: PostgreSQL's own rules ("src/backend/backup/basebackup.c").
//!
//! Left out is what the server makes anew when it starts, what belongs to the running process, and what no recovery
//! brings back: temporary relations, and unlogged ones but for their init forks.

use std::collections::HashSet;

/// Folders of the data directory that are kept, empty.
const EMPTIED: [&str; 8] = [
    "pg_wal",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
];

/// Left out wherever they are.
const FILES: [&str; 5] = [
    "postmaster.pid",
    "postmaster.opts",
    "backup_manifest",
    "current_logfiles",
    "current_logfiles.tmp",
];

/// Left out with whatever follows: `backup_label.old` too, `pg_internal.init.12345`, and sockets' lock files.
const PREFIXES: [&str; 5] =
    ["backup_label", "tablespace_map", "pg_internal.init", "pgsql_tmp", ".s.PGSQL."];

/// True for a folder at the top of the data directory whose contents are left out.
pub fn is_emptied(path: &str) -> bool {
    EMPTIED.contains(&path)
}

/// Folders that must be in a restored `pg_wal`.
pub fn folders_of_wal(major: u32) -> &'static [&'static str] {
    match major {
        ..17 => &["archive_status"],
        _ => &["archive_status", "summaries"],
    }
}

/// True for a file or folder that is left out wherever it is.
pub fn is_left_out(name: &str) -> bool {
    FILES.contains(&name)
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || name.ends_with(".auto.conf.tmp")
}

/// True for the folders that hold relations.
pub fn holds_relations(path: &str) -> bool {
    match path.split('/').collect::<Vec<_>>()[..] {
        ["global"] => true,
        ["base", database] => is_number(database),
        ["pg_tblspc", space, version, database] => {
            is_number(space) && version.starts_with("PG_") && is_number(database)
        }
        _ => false,
    }
}

/// A file of a permanent relation: `<relation>[_<fork>][.<segment>]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationFile<'a> {
    pub relation: &'a str,
    pub fork: Fork,
    /// Which part of the fork: 0 for the first.
    pub segment: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    Main,
    FreeSpace,
    Visibility,
    Init,
}

impl RelationFile<'_> {
    pub fn parse(name: &str) -> Option<RelationFile<'_>> {
        let (stem, segment) = match name.split_once('.') {
            Some((stem, segment)) => (stem, number(segment).filter(|&segment| segment > 0)?),
            None => (name, 0),
        };
        let (relation, fork) = match stem.split_once('_') {
            None => (stem, Fork::Main),
            Some((relation, "fsm")) => (relation, Fork::FreeSpace),
            Some((relation, "vm")) => (relation, Fork::Visibility),
            Some((relation, "init")) => (relation, Fork::Init),
            Some(_) => return None,
        };
        is_number(relation).then_some(RelationFile { relation, fork, segment })
    }
}

/// A relation of one session: `t<backend>_<relation>[_<fork>][.<segment>]`.
pub fn is_temporary(name: &str) -> bool {
    let parts = name.strip_prefix('t').and_then(|rest| rest.split_once('_'));
    parts.is_some_and(|(backend, file)| is_number(backend) && RelationFile::parse(file).is_some())
}

/// The relations of one folder that have an init fork: their other forks are emptied by recovery.
pub fn unlogged<'a>(names: impl Iterator<Item = &'a str>) -> HashSet<String> {
    let init = |name| RelationFile::parse(name).filter(|file| file.fork == Fork::Init);
    names.filter_map(init).map(|file| file.relation.to_string()).collect()
}

pub fn is_number(text: &str) -> bool {
    number(text).is_some()
}

fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_relations() {
        let parse = |name| RelationFile::parse(name).map(|f| (f.relation, f.fork, f.segment));
        assert_eq!(parse("16384"), Some(("16384", Fork::Main, 0)));
        assert_eq!(parse("16384.12"), Some(("16384", Fork::Main, 12)));
        assert_eq!(parse("16384_fsm"), Some(("16384", Fork::FreeSpace, 0)));
        assert_eq!(parse("16384_vm.1"), Some(("16384", Fork::Visibility, 1)));
        assert_eq!(parse("16384_init"), Some(("16384", Fork::Init, 0)));
        for other in [
            "PG_VERSION",
            "pg_filenode.map",
            "16384_",
            "16384.",
            "16384.0",
            "16384_x",
            "t3_16384",
            "",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn temporary_relations() {
        for yes in ["t3_16384", "t12_16384_fsm", "t3_16384.1", "t3_16384_vm.2"] {
            assert!(is_temporary(yes), "{yes}");
        }
        for no in ["t_16384", "t3_", "3_16384", "t3_16384_x", "table", "t3x_1"] {
            assert!(!is_temporary(no), "{no}");
        }
    }

    #[test]
    fn folders_of_relations() {
        for yes in ["global", "base/5", "pg_tblspc/16385/PG_15_202209061/5"] {
            assert!(holds_relations(yes), "{yes}");
        }
        for no in [
            "base",
            "base/pgsql_tmp",
            "pg_tblspc/16385",
            "pg_tblspc/16385/PG_15_202209061",
            "pg_xact",
        ] {
            assert!(!holds_relations(no), "{no}");
        }
    }
}
