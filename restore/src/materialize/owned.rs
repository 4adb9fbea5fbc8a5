//! What in a data directory is PostgreSQL's own, by its name: the files that a restore over it may change and remove.
//!
//! Everything else, such as configuration, logs, certificates and what people put there, is somebody else's, and is left as it is.
//! The names are those of "src/backend/backup/basebackup.c" and of the subsystems that make the files. No I/O.

/// At the top: what belongs to the state of the server, and to recovery.
const AT_TOP: [&str; 10] = [
    "PG_VERSION",
    "backup_label",
    "backup_label.old",
    "backup_manifest",
    "postmaster.opts",
    "postmaster.pid",
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
    "tablespace_map.old",
];
/// All that is in them is PostgreSQL's.
const WHOLE: [&str; 6] =
    ["pg_dynshmem", "pg_logical", "pg_replslot", "pg_snapshots", "pg_stat", "pg_stat_tmp"];
/// Files that are named by a number in hexadecimal.
const NUMBERED: [&str; 6] =
    ["pg_commit_ts", "pg_notify", "pg_serial", "pg_subtrans", "pg_twophase", "pg_xact"];

/// True for a file of PostgreSQL's own. `path` is relative to the data directory, tablespaces are `pg_tblspc/<oid>/...`.
pub fn is_postgres(path: &str) -> bool {
    match path.split('/').collect::<Vec<_>>()[..] {
        [name] => AT_TOP.contains(&name),
        ["global", name] => is_in_database(name) || name == "pg_control",
        ["base", "pgsql_tmp", ..] | ["pg_tblspc", _, _, "pgsql_tmp", ..] => true,
        ["base", database, name] | ["pg_tblspc", _, _, database, name] => {
            is_number(database) && is_in_database(name)
        }
        ["pg_multixact", "members" | "offsets", name] => is_hex(name),
        ["pg_wal", name] => is_wal(name),
        ["pg_wal", "archive_status" | "summaries", ..] => true,
        [top, ..] if WHOLE.contains(&top) => true,
        [top, name] => NUMBERED.contains(&top) && is_hex(name),
        _ => false,
    }
}

/// True for a folder that goes if nothing is left in it: of a database, a slot, temporary files.
pub fn is_postgres_folder(path: &str) -> bool {
    match path.split('/').collect::<Vec<_>>()[..] {
        ["base", name] | ["pg_tblspc", _, _, name] => is_number(name) || name == "pgsql_tmp",
        ["base", "pgsql_tmp", ..] | ["pg_tblspc", _, _, "pgsql_tmp", ..] => true,
        ["pg_replslot", ..] => path != "pg_replslot",
        _ => false,
    }
}

/// What lies in the folder of a database, and in `global`.
fn is_in_database(name: &str) -> bool {
    let is_plain = ["PG_VERSION", "pg_filenode.map", "pg_filenode.map.tmp"].contains(&name);
    is_plain
        || name.starts_with("pg_internal.init")
        || name.starts_with("pgsql_tmp")
        || is_relation(name)
        || is_temporary(name)
}

/// `<relation>[_<fork>][.<segment>]`
fn is_relation(name: &str) -> bool {
    let (stem, segment) = name.split_once('.').map_or((name, None), |(a, b)| (a, Some(b)));
    let (relation, fork) = stem.split_once('_').map_or((stem, None), |(a, b)| (a, Some(b)));
    is_number(relation)
        && segment.is_none_or(is_number)
        && fork.is_none_or(|fork| ["fsm", "vm", "init"].contains(&fork))
}

/// `t<backend>_<relation>...`
fn is_temporary(name: &str) -> bool {
    let parts = name.strip_prefix('t').and_then(|rest| rest.split_once('_'));
    parts.is_some_and(|(backend, file)| is_number(backend) && is_relation(file))
}

/// Segments, whole, partial or in the making; histories; backups' labels.
fn is_wal(name: &str) -> bool {
    let (stem, rest) = name.split_once('.').map_or((name, ""), |(stem, rest)| (stem, rest));
    let is_segment = stem.len() == 24
        && is_hex(stem)
        && (["", "partial"].contains(&rest) || rest.ends_with("backup"));
    let is_history = stem.len() == 8 && is_hex(stem) && rest == "history";
    let is_temporary = ["xlogtemp", "RECOVERYXLOG", "RECOVERYHISTORY"].contains(&stem);
    is_segment || is_history || is_temporary
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_hex(text: &str) -> bool {
    text.len() >= 4 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_postgresqls() {
        for path in [
            "PG_VERSION",
            "tablespace_map",
            "postmaster.pid",
            "global/1262",
            "global/pg_control",
            "global/pg_filenode.map",
            "base/5/16384",
            "base/5/16384.12",
            "base/5/16384_vm.1",
            "base/5/16384_init",
            "base/5/t3_16384",
            "base/5/pg_internal.init.77",
            "base/pgsql_tmp/pgsql_tmp8.0",
            "pg_tblspc/16385/PG_15_202209061/5/16386_fsm",
            "pg_xact/0000",
            "pg_multixact/members/00AF",
            "pg_twophase/0000000000000123",
            "pg_logical/replorigin_checkpoint",
            "pg_replslot/standby/state",
            "pg_wal/000000010000000000000001",
            "pg_wal/000000010000000000000001.partial",
            "pg_wal/000000010000000000000001.00000028.backup",
            "pg_wal/00000002.history",
            "pg_wal/archive_status/x.done",
            "pg_stat/pgstat.stat",
        ] {
            assert!(is_postgres(path), "{path}");
        }
    }

    #[test]
    fn what_is_somebody_elses() {
        for path in [
            "postgresql.conf",
            "postgresql.auto.conf",
            "pg_hba.conf",
            "pg_ident.conf",
            "conf.d/own.conf",
            "server.key",
            "log/postgresql.log",
            "logfile",
            "current_logfiles",
            "base/notes.txt",
            "base/5/notes.txt",
            "base/five/16384",
            "global/notes",
            "pg_xact/notes",
            "pg_wal/notes",
            "pg_tblspc/16385/notes",
            "pg_tblspc/16385/PG_15_202209061/notes",
            "backstay-restore/plan.json",
            "pg_multixact/members/notes",
        ] {
            assert!(!is_postgres(path), "{path}");
        }
    }

    #[test]
    fn folders_that_may_go() {
        for path in
            ["base/5", "base/pgsql_tmp/x.fileset", "pg_replslot/standby", "pg_tblspc/1/PG_15_1/5"]
        {
            assert!(is_postgres_folder(path), "{path}");
        }
        for path in [
            "base",
            "global",
            "log",
            "pg_replslot",
            "pg_wal/archive_status",
            "pg_tblspc/1",
            "pg_tblspc/1/PG_15_1",
        ] {
            assert!(!is_postgres_folder(path), "{path}");
        }
    }
}
