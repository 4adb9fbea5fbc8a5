use super::*;

const EXAMPLE: &str = r#"
cluster   = "orders"
state-dir = "/var/lib/backstay"

[postgres]
conninfo = "host=/var/run/postgresql user=backstay dbname=postgres"
data-dir = "/var/lib/postgresql/17/main"

[[location]]
name = "frankfurt"
url  = "s3://acme-backups-eu/orders"

[[location]]
name = "attic"
url  = "file:///srv/backups/orders"

[durability]
acknowledge    = "majority"
flush-interval = "2s"

[snapshot]
schedule = "0 2 * * *"

[retention]
window = "30d"

[keys]
provider = "file"
path     = "/etc/backstay/orders.key"
"#;

fn parse(text: &str) -> Result<Settings, Vec<String>> {
    Settings::parse(text, Some("DB1.example".into()))
}

#[test]
fn the_example_is_read() {
    let settings = parse(EXAMPLE).unwrap();
    assert_eq!(settings.cluster.as_str(), "orders");
    assert_eq!(settings.postgres.slot, "backstay_db1_example");
    assert_eq!(settings.locations.len(), 2);
    assert_eq!(settings.durability.acknowledge, Acknowledge::Majority);
    assert_eq!(settings.retention.window, Duration::from_secs(30 * 86_400));
    assert_eq!(settings.spool.bytes_max, 16 << 30);
}

#[test]
fn every_fault_is_reported_with_its_line_and_remedy() {
    let text = r#"
cluster = "or/ders"
colour = "blue"
[[location]]
name = "a"
url = "file:///a"
[[location]]
name = "a"
url = "file:///a"
[durability]
acknowledge = "most"
flush-intervall = "5s"
[snapshot]
schedule = "* *"
compression-level = 40
[keys]
provider = "file"
"#;
    let faults = parse(text).unwrap_err();
    let expect = [
        (2, "or/ders"),
        (3, "colour: unknown key"),
        (8, "another location has this name"),
        (9, "another location has this URL"),
        (11, "choose from: spool, any, majority, all"),
        (12, "flush-intervall: unknown key"),
        (14, "2 fields instead of five"),
        (15, "from 1 to 19"),
        (16, "path: missing"),
    ];
    assert_eq!(faults.len(), expect.len(), "{faults:#?}");
    for (fault, (line, part)) in faults.iter().zip(expect) {
        assert!(fault.starts_with(&format!("line {line}: ")) && fault.contains(part), "{fault}");
    }
}

#[test]
fn an_empty_file_says_what_is_needed() {
    let faults = parse("").unwrap_err().join("\n");
    for part in ["cluster = \"orders\"", "[[location]]", "orders.key"] {
        assert!(faults.contains(part), "{part} not in {faults}");
    }
}

#[test]
fn broken_toml_names_the_line() {
    assert!(parse("cluster = \"a\"\nstate-dir = \n").unwrap_err()[0].starts_with("line 2"));
}

#[test]
fn majority_is_more_than_half() {
    let needed: Vec<usize> = (1..=5).map(|n| Acknowledge::Majority.needed(n)).collect();
    assert_eq!(needed, [1, 2, 2, 3, 3]);
    assert_eq!(Acknowledge::Spool.needed(3), 0);
}

#[test]
fn what_gives_when_the_spool_is_full() {
    assert_eq!(parse(EXAMPLE).unwrap().durability.on_spool_full, OnSpoolFull::Hold);
    let with = |policy: &str, word: &str| {
        let line = format!("acknowledge    = \"{policy}\"\non-spool-full = \"{word}\"");
        parse(&EXAMPLE.replace("acknowledge    = \"majority\"", &line))
    };
    let settings = with("spool", "release").unwrap();
    assert_eq!(settings.durability.on_spool_full, OnSpoolFull::Release);
    assert_eq!(with("all", "hold").unwrap().durability.on_spool_full, OnSpoolFull::Hold);
    let faults = with("spool", "drop").unwrap_err();
    assert!(faults[0].contains("choose from: hold, release"), "{faults:?}");
    for policy in ["any", "majority", "all"] {
        let faults = with(policy, "release").unwrap_err();
        assert_eq!(faults.len(), 1);
        assert!(faults[0].contains("that no location has; write \"hold\""), "{faults:?}");
    }
}

#[test]
fn secrets_do_not_show() {
    let text = EXAMPLE.replace(
        "name = \"frankfurt\"",
        "name = \"frankfurt\"\naccess-key-id = \"AKIA\"\nsecret-access-key = \"hunter2\"",
    );
    assert!(!format!("{:?}", parse(&text).unwrap()).contains("hunter2"));
}
