use super::*;
use std::os::unix::fs::symlink;

struct Cluster {
    dir: tempfile::TempDir,
    tree: Tree,
}

impl Cluster {
    fn new(major: u32) -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        fs::create_dir(&data_dir).unwrap();
        let tree = Tree { data_dir, major, catalog_version: 202209061, foreign: Vec::new() };
        Cluster { dir, tree }
    }

    fn file(&self, path: &str) -> &Cluster {
        let path = self.tree.data_dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
        self
    }

    fn files(&self, paths: &[&str]) -> &Cluster {
        paths.iter().for_each(|path| {
            self.file(path);
        });
        self
    }

    fn found(&self) -> Vec<Found> {
        let mut all = Vec::new();
        walk(&self.tree, &mut |found| {
            all.push(found);
            Ok(())
        })
        .unwrap();
        all
    }

    /// Folders end in `/`.
    fn paths(&self) -> Vec<String> {
        let path = |found: Found| match found.what {
            What::Folder => found.path + "/",
            What::File { .. } => found.path,
        };
        self.found().into_iter().map(path).collect()
    }
}

#[test]
fn folders_precede_their_files_and_control_is_kept_for_last() {
    let cluster = Cluster::new(15);
    cluster.files(&[
        "PG_VERSION",
        "base/5/1259",
        "base/5/PG_VERSION",
        "global/1262",
        "global/pg_control",
    ]);
    cluster.files(&["log/today.log", "postgresql.auto.conf"]);
    let expected = [
        "PG_VERSION",
        "base/",
        "base/5/",
        "base/5/1259",
        "base/5/PG_VERSION",
        "global/",
        "global/1262",
        "log/",
        "log/today.log",
        "postgresql.auto.conf",
    ];
    assert_eq!(cluster.paths(), expected);
}

#[test]
fn emptied_folders_are_kept() {
    let cluster = Cluster::new(15);
    let emptied = [
        "pg_dynshmem",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat_tmp",
        "pg_subtrans",
    ];
    emptied.iter().for_each(|folder| {
        cluster.file(&format!("{folder}/slot/state"));
    });
    cluster.files(&[
        "pg_wal/000000010000000000000001",
        "pg_wal/archive_status/x.ready",
        "pg_xact/0000",
    ]);
    let mut expected: Vec<String> = emptied.iter().map(|folder| format!("{folder}/")).collect();
    expected.extend(
        ["pg_wal/", "pg_wal/archive_status/", "pg_xact/", "pg_xact/0000"].map(String::from),
    );
    assert_eq!(cluster.paths(), expected);
    let newer = Cluster::new(17);
    newer.file("pg_wal/000000010000000000000001");
    assert_eq!(newer.paths(), ["pg_wal/", "pg_wal/archive_status/", "pg_wal/summaries/"]);
}

#[test]
fn what_belongs_to_the_running_server_is_left_out() {
    let cluster = Cluster::new(15);
    cluster.files(&[
        "postmaster.pid",
        "postmaster.opts",
        "backup_label",
        "backup_label.old",
        "tablespace_map",
        "tablespace_map.old",
        "backup_manifest",
        "postgresql.auto.conf.tmp",
        "current_logfiles",
        "current_logfiles.tmp",
        ".s.PGSQL.5432.lock",
        "base/5/pg_internal.init",
        "base/5/pg_internal.init.123",
        "global/pg_internal.init",
        "base/pgsql_tmp/pgsql_tmp1.0",
        "base/5/pgsql_tmp2",
        "backstay-restore/plan",
        "kept",
    ]);
    assert_eq!(cluster.paths(), ["base/", "base/5/", "global/", "kept"]);
}

#[test]
fn temporary_relations_go_and_of_unlogged_ones_only_the_init_fork_stays() {
    let cluster = Cluster::new(15);
    cluster.files(&[
        "base/5/100",
        "base/5/100_fsm",
        "base/5/100_init",
        "base/5/100_vm",
        "base/5/100.1",
        "base/5/1000",
        "base/5/200",
        "base/5/200_vm",
        "base/5/t3_300",
        "base/5/t3_300_fsm",
        "base/5/t3_300.1",
        "log/t3_300",
        "log/100",
    ]);
    let expected = [
        "base/",
        "base/5/",
        "base/5/1000",
        "base/5/100_init",
        "base/5/200",
        "base/5/200_vm",
        "log/",
        "log/100",
        "log/t3_300",
    ];
    assert_eq!(cluster.paths(), expected);
}

#[test]
fn of_a_tablespace_only_this_version_is_taken() {
    let cluster = Cluster::new(15);
    let space = cluster.dir.path().join("space");
    for file in ["PG_15_202209061/5/16390", "PG_14_202107181/5/16390", "mine.txt"] {
        fs::create_dir_all(space.join(file).parent().unwrap()).unwrap();
        fs::write(space.join(file), "x").unwrap();
    }
    cluster.file("pg_tblspc/16500/PG_15_202209061/5/16400_init");
    cluster.files(&["pg_tblspc/16500/PG_15_202209061/5/16400", "pg_tblspc/16500/PG_16_1/5/1"]);
    symlink(&space, cluster.tree.data_dir.join("pg_tblspc/16385")).unwrap();
    symlink("/nowhere/at/all", cluster.tree.data_dir.join("pg_tblspc/16386")).unwrap();
    let expected = [
        "pg_tblspc/",
        "pg_tblspc/16385/",
        "pg_tblspc/16385/PG_15_202209061/",
        "pg_tblspc/16385/PG_15_202209061/5/",
        "pg_tblspc/16385/PG_15_202209061/5/16390",
        "pg_tblspc/16500/",
        "pg_tblspc/16500/PG_15_202209061/",
        "pg_tblspc/16500/PG_15_202209061/5/",
        "pg_tblspc/16500/PG_15_202209061/5/16400_init",
    ];
    assert_eq!(cluster.paths(), expected);
    let spaces = tablespaces(&cluster.tree.data_dir).unwrap();
    let outside: Vec<_> = spaces.iter().map(|s| (s.oid, s.location.as_str())).collect();
    assert_eq!(outside, [(16385, space.to_str().unwrap()), (16386, "/nowhere/at/all")]);
}

#[test]
fn a_tablespace_inside_the_data_directory_is_taken_once() {
    let cluster = Cluster::new(15);
    cluster.file("mine/PG_15_202209061/5/16390");
    fs::create_dir(cluster.tree.data_dir.join("pg_tblspc")).unwrap();
    symlink(cluster.tree.data_dir.join("mine"), cluster.tree.data_dir.join("pg_tblspc/16385"))
        .unwrap();
    let taken = cluster.paths().into_iter().filter(|path| path.ends_with("16390"));
    assert_eq!(taken.collect::<Vec<_>>(), ["pg_tblspc/16385/PG_15_202209061/5/16390"]);
}

#[test]
fn links_are_followed_to_data_but_not_to_other_folders() {
    let mut cluster = Cluster::new(15);
    let outside = cluster.dir.path().join("outside");
    fs::create_dir_all(outside.join("wal")).unwrap();
    fs::create_dir_all(outside.join("5")).unwrap();
    for file in ["5/1259", "wal/000000010000000000000001", "postgresql.conf"] {
        fs::write(outside.join(file), "x").unwrap();
    }
    cluster.files(&["base/1/1259", "state/spool"]);
    cluster.tree.foreign.push(cluster.tree.data_dir.join("state"));
    for (to, at) in
        [("wal", "pg_wal"), ("5", "base/5"), ("wal", "log"), ("postgresql.conf", "postgresql.conf")]
    {
        symlink(outside.join(to), cluster.tree.data_dir.join(at)).unwrap();
    }
    let expected = [
        "base/",
        "base/1/",
        "base/1/1259",
        "base/5/",
        "base/5/1259",
        "log/",
        "pg_wal/",
        "pg_wal/archive_status/",
        "postgresql.conf",
    ];
    assert_eq!(cluster.paths(), expected);
}

#[test]
fn a_link_that_leads_back_up_is_an_error_and_not_an_endless_walk() {
    let cluster = Cluster::new(15);
    cluster.file("base/1/1259");
    symlink("..", cluster.tree.data_dir.join("base/up")).unwrap();
    let error = walk(&cluster.tree, &mut |_| Ok(())).unwrap_err();
    assert!(error.message().contains("nested too deeply"), "{error}");
}

#[test]
fn relations_have_their_segment_and_files_their_size_and_mode() {
    let cluster = Cluster::new(15);
    cluster.files(&["base/5/16384.3", "base/5/PG_VERSION"]);
    let path = cluster.tree.data_dir.join("base/5/16384.3");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let found = cluster.found();
    let of = |found: &Found| match found.what {
        What::File { size, segment, .. } => (found.mode, size, segment),
        What::Folder => panic!("{found:?}"),
    };
    assert_eq!(of(&found[2]), (0o640, 1, Some(3)));
    assert_eq!((of(&found[3]).1, of(&found[3]).2), (1, None));
}

#[test]
fn a_data_directory_that_is_not_there_is_named() {
    let tree =
        Tree { data_dir: "/no/such".into(), major: 15, catalog_version: 1, foreign: Vec::new() };
    let error = walk(&tree, &mut |_| Ok(())).unwrap_err();
    assert!(error.message().contains("/no/such") && error.remedy_text().is_some(), "{error}");
}
