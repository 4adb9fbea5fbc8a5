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

    let immediate = recovery_lines(&plan(StopPoint::Consistent), Path::new("/two"), AtTarget::Pause);
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
    let mut escaping = root.clone();
    escaping.config_files[0].name = "../x".into();
    let other = tempfile::tempdir().unwrap();
    assert!(
        SettingsFiles { dir: other.path(), owner: files.owner }
            .place_config(&escaping, Existing::Nothing)
            .is_err()
    );
}
