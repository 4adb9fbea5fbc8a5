use super::*;
use crate::plan::Leg;
use backstay_common::id::SystemId;
use backstay_common::lsn::Lsn;
use backstay_common::snapshot::testing;

/// A plan that ends in the middle of timeline 3.
pub(crate) fn plan(stop: StopPoint) -> Plan {
    let leg = |branch: &str, start: u64, end: u64| Leg {
        branch: branch.parse().unwrap(),
        start: Lsn::new(start),
        end: Lsn::new(end),
    };
    Plan {
        cluster: "orders".parse().unwrap(),
        system: SystemId::new(7),
        target: "latest".into(),
        snapshot: "20261122T020000Z-1f2e3d4c".parse().unwrap(),
        server_version: 150_018,
        segment_bytes: 16 << 20,
        legs: vec![
            leg("00000001-01020304", 0x200_0000, 0x350_0000),
            leg("00000003-01020304", 0x300_0000, 0x512_3456),
        ],
        stop,
        end: Lsn::new(0x512_3456),
        last_transaction: None,
        first_lost: None,
        histories: Vec::new(),
        minimums: HotStandbyMinimums::default(),
        locations: Vec::new(),
        unreachable: Vec::new(),
        database_bytes: 0,
        snapshot_bytes: 0,
        wal_bytes: 0,
        estimate_seconds: 0,
        wal_from: None,
        notes: Vec::new(),
    }
}

fn joined(lines: &[String]) -> String {
    lines.join("\n")
}

#[test]
fn the_target_is_an_lsn_and_the_timeline_a_number() {
    let before = plan(StopPoint::BeforeRecord(Lsn::new(0x512_0000)));
    let ours = Path::new("/data/backstay-restore");
    let text = joined(&recovery_lines(&before, ours, AtTarget::Pause));
    let value = |name| value_of(&text, name).unwrap();
    assert_eq!(value("recovery_target_lsn"), "0/5120000");
    assert_eq!(value("recovery_target_inclusive"), "off");
    assert_eq!(value("recovery_target_timeline"), "3");
    assert_eq!(value("recovery_target_action"), "pause");
    assert_eq!(value("recovery_end_command"), "", "restore clears up by itself");
    let text = joined(&recovery_lines(&plan(StopPoint::Consistent), ours, AtTarget::Promote));
    assert_eq!(
        value_of(&text, "recovery_target"),
        None,
        "PostgreSQL would miss it at the end of WAL"
    );
    assert_eq!(value_of(&text, "recovery_target_lsn"), None);
}

#[test]
fn a_second_restore_leaves_nothing_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let files = SettingsFiles { dir: folder.path(), owner: Owner::of_process() };
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    write(MAIN, "archive_mode = on\narchive_command = 'cp %p /a/%f'\nport = 5599\n");
    write(
        AUTO,
        "work_mem = '8MB'\nprimary_conninfo = 'host=original'\nrecovery_target_time = 'x'\n",
    );
    write("standby.signal", "");
    let minimums = HotStandbyMinimums { max_connections: 300, ..Default::default() };
    let after = plan(StopPoint::AfterRecord(Lsn::new(0x512_0000)));
    let recovery = recovery_lines(&after, Path::new("/one"), AtTarget::Pause);
    let cleared = files.prepare_recovery(&recovery, &safety_lines(&minimums, 15, None)).unwrap();
    for part in [
        "primary_conninfo",
        "recovery_target_time",
        "standby.signal",
        "archive_command = 'cp %p /a/%f'",
    ] {
        assert!(joined(&cleared).contains(part), "{part} in {cleared:?}");
    }
    assert!(!folder.path().join("standby.signal").exists());
    assert!(folder.path().join("recovery.signal").exists());
    assert_eq!(value_of(&read(AUTO), "archive_mode").as_deref(), Some("off"));
    assert_eq!(value_of(&read(AUTO), "max_connections").as_deref(), Some("300"));
    assert_eq!(files.port().unwrap(), 5599);

    let immediate =
        recovery_lines(&plan(StopPoint::Consistent), Path::new("/two"), AtTarget::Pause);
    let again =
        files.prepare_recovery(&immediate, &safety_lines(&minimums, 15, Some(5600))).unwrap();
    assert!(!joined(&again).contains(AUTO), "our own blocks are not the operator's: {again:?}");
    let text = read(AUTO);
    assert_eq!(text.matches("settings begin").count(), 2);
    assert_eq!(value_of(&text, "recovery_target_lsn"), None);
    assert_eq!(value_of(&text, "work_mem").as_deref(), Some("8MB"));
    assert_eq!(files.port().unwrap(), 5600);

    files.finish_recovery(&immediate).unwrap();
    assert_eq!(value_of(&read(AUTO), "restore_command"), None);
    assert_eq!(value_of(&read(AUTO), "archive_mode").as_deref(), Some("off"), "safety stays");
}

#[test]
fn what_points_at_the_original_is_commented_out() {
    let folder = tempfile::tempdir().unwrap();
    let files = SettingsFiles { dir: folder.path(), owner: Owner::of_process() };
    let config = |name: &str, content: &str| ConfigFile {
        name: name.into(),
        source: format!("/etc/postgresql/15/main/{name}"),
        content: content.into(),
    };
    let root = Root {
        config_files: vec![
            config(
                MAIN,
                "data_directory = '/var/lib/x'\nport = 5601\ninclude_dir = 'conf.d'\nrecovery_target_xid = '9'\n",
            ),
            config("pg_hba.conf", "local all all md5\n"),
            config("conf.d/a.conf", "work_mem = 1MB\n"),
        ],
        ..testing::root()
    };
    let said = joined(&files.place_config(&root, Existing::Nothing).unwrap());
    for part in [
        "/etc/postgresql/15/main/pg_hba.conf",
        "commented out in postgresql.conf: data_directory",
        "pg_ident.conf",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let text = std::fs::read_to_string(folder.path().join(MAIN)).unwrap();
    assert_eq!(value_of(&text, "data_directory"), None);
    assert_eq!(value_of(&text, "recovery_target_xid"), None);
    assert_eq!(files.port().unwrap(), 5601);
    assert!(folder.path().join("conf.d/a.conf").exists());
    let again = SettingsFiles { dir: folder.path(), owner: files.owner };
    assert_eq!(again.place_config(&root, Existing::Unfinished).unwrap(), [""; 0], "said once");
    let mut escaping = root.clone();
    escaping.config_files[0].name = "../x".into();
    let other = tempfile::tempdir().unwrap();
    assert!(
        SettingsFiles { dir: other.path(), owner: files.owner }
            .place_config(&escaping, Existing::Nothing)
            .is_err()
    );
}

/// `main` and `conf.d/a.conf`, as a snapshot brings them; what is said of them.
fn cleaned(dir: &Path, main: &str, a: &str, existing: Existing) -> String {
    std::fs::create_dir(dir.join("conf.d")).unwrap();
    std::fs::write(dir.join(MAIN), main).unwrap();
    std::fs::write(dir.join("conf.d/a.conf"), a).unwrap();
    let files = SettingsFiles { dir, owner: Owner::of_process() };
    joined(&files.place_config(&testing::root(), existing).unwrap())
}

#[test]
fn included_files_have_no_recovery_target_either() {
    for existing in [Existing::Nothing, Existing::Cluster] {
        let folder = tempfile::tempdir().unwrap();
        let main = "include_dir = 'conf.d'\nport = 5601\n";
        let a = "recovery_target_time = 'x'\ninclude '../b.conf'\nport = 5602\n";
        std::fs::write(
            folder.path().join("b.conf"),
            "recovery_target_xid = '9'\ninclude 'b.conf'\n",
        )
        .unwrap();
        let said = cleaned(folder.path(), main, a, existing);
        assert!(said.contains("commented out in conf.d/a.conf: recovery_target_time"), "{said}");
        assert!(said.contains("commented out in b.conf: recovery_target_xid"), "{said}");
        let files = SettingsFiles { dir: folder.path(), owner: Owner::of_process() };
        assert_eq!(files.value("recovery_target_time").unwrap(), None);
        assert_eq!(files.value("recovery_target_xid").unwrap(), None);
        assert_eq!(files.port().unwrap(), 5601, "the last one counts, wherever it is");
    }
}

#[test]
fn includes_that_lead_out_are_commented_out_in_a_copy() {
    let include = "include '/etc/pg/shared.conf'\ninclude_if_exists = '/etc/pg/own.conf'\n";
    let main = format!("{include}include_dir '../elsewhere'\ninclude_dir 'conf.d'\n");
    let folder = tempfile::tempdir().unwrap();
    let inside = format!("include '{}/c.conf'\n", folder.path().display());
    let said = cleaned(folder.path(), &main, &inside, Existing::Nothing);
    for part in ["include '/etc/pg/shared.conf'", "'/etc/pg/own.conf'", "'../elsewhere'"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let main_after = std::fs::read_to_string(folder.path().join(MAIN)).unwrap();
    let left: Vec<_> = main_after.lines().filter_map(text::include_of).collect();
    assert_eq!(left, [("include_dir".to_string(), "conf.d".to_string())]);
    let a_after = std::fs::read_to_string(folder.path().join("conf.d/a.conf")).unwrap();
    assert_eq!(a_after, inside, "it stays inside");

    let own = tempfile::tempdir().unwrap();
    let said = cleaned(own.path(), &main, "", Existing::Cluster);
    assert!(!said.contains("include"), "the cluster's own files: {said}");
    std::fs::remove_dir_all(own.path().join("conf.d")).unwrap();
    let files = SettingsFiles { dir: own.path(), owner: Owner::of_process() };
    assert_eq!(
        (files.port().unwrap(), own.path().join("conf.d").exists()),
        (5432, false),
        "only read"
    );
    files.place_config(&testing::root(), Existing::Cluster).unwrap();
    assert!(own.path().join("conf.d").exists(), "PostgreSQL wants it");
}

#[test]
fn certificates_that_are_not_here_are_named() {
    let here = tempfile::NamedTempFile::new().unwrap();
    let tls = format!(
        "ssl_cert_file = '/etc/ssl/certs/gone.pem'\nssl_key_file = '{}'\nssl_ca_file = 'root.crt'\n",
        here.path().display()
    );
    for (ssl, is_named) in [("on", true), ("off", false)] {
        let folder = tempfile::tempdir().unwrap();
        let main = format!("ssl = {ssl}\ninclude_dir 'conf.d'\n");
        let said = cleaned(folder.path(), &main, &tls, Existing::Nothing);
        assert_eq!(said.contains("ssl_cert_file is /etc/ssl/certs/gone.pem"), is_named, "{said}");
        assert!(!said.contains("ssl_key_file") && !said.contains("ssl_ca_file"), "{said}");
    }
}
