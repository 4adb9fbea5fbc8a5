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
acknowledge    = "all"
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
    assert_eq!(settings.durability.acknowledge, Acknowledge::All);
    assert_eq!(settings.retention.window, Duration::from_secs(30 * 86_400));
    assert_eq!(settings.spool.bytes_max, 16 << 30);
    assert_eq!(settings.index.spans, 128);
}

#[test]
fn blocks_of_an_index_are_powers_of_two() {
    let with = |spans: &str| parse(&format!("{EXAMPLE}\n[index]\nspans = {spans}\n"));
    assert_eq!(with("16").unwrap().index.spans, 16);
    for bad in ["0", "48", "8192"] {
        let faults = with(bad).unwrap_err();
        assert!(faults.len() == 1 && faults[0].contains("spans"), "{faults:?}");
    }
}

#[test]
fn what_is_kept_longer_is_read_and_bad_numbers_are_refused() {
    let retention = |lines: &str| parse(&EXAMPLE.replace("window = \"30d\"", lines));
    let kept = retention("keep-last = 3\nkeep = { weekly = 8, monthly = 12 }").unwrap().retention;
    assert_eq!((kept.keep_last, kept.weekly, kept.monthly), (3, 8, 12));
    assert_eq!((kept.window, kept.grace), (Duration::from_secs(7 * 86_400), GRACE));
    assert_eq!(kept.rules().margin, Duration::from_secs(3600));
    let trial = retention("window = \"20s\"\ngrace = \"0s\"").unwrap().retention;
    assert_eq!(trial.rules().margin, Duration::from_secs(20));
    for (lines, part) in [
        ("window = \"20s\"", "shorter than an hour"),
        ("keep-last = 0", "from 1 to"),
        ("keep = { weekly = -1 }", "weekly"),
        ("keep = { daily = 3 }", "correct it to one of: weekly, monthly"),
        ("keep = 3", "no table"),
        ("grace = \"60d\"", "leave it out"),
    ] {
        let faults = retention(lines).unwrap_err();
        assert!(faults.len() == 1 && faults[0].contains(part), "{lines}: {faults:?}");
    }
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
max-rate = "1KiB"
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
        (16, "max-rate: out of range"),
        (17, "path: missing"),
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
        parse(&EXAMPLE.replace("acknowledge    = \"all\"", &line))
    };
    let settings = with("spool", "release").unwrap();
    assert_eq!(settings.durability.on_spool_full, OnSpoolFull::Release);
    assert_eq!(with("all", "hold").unwrap().durability.on_spool_full, OnSpoolFull::Hold);
    let faults = with("spool", "drop").unwrap_err();
    assert!(faults[0].contains("choose from: hold, release"), "{faults:?}");
    for policy in ["any", "all"] {
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
    let text = text.replace("conninfo = \"", "conninfo = \"password=hunter3 ");
    assert!(text.contains("hunter3"), "{text}");
    let shown = format!("{:?}", parse(&text).unwrap());
    assert!(!shown.contains("hunter"), "{shown}");
}

/// Faults of a config whose locations are these tables.
fn faults_of(locations: &str, acknowledge: &str) -> Vec<String> {
    let text = format!(
        "cluster = \"a\"\n{locations}[durability]\nacknowledge = \"{acknowledge}\"\n[keys]\npath = \"/k\"\n"
    );
    parse(&text).err().unwrap_or_default()
}

fn folder(name: &str, role: &str) -> String {
    format!("[[location]]\nname = \"{name}\"\nurl = \"file:///{name}\"\nrole = \"{role}\"\n")
}

#[test]
fn a_majority_of_two_is_refused_unless_it_is_called_all() {
    let two = folder("a", "required") + &folder("b", "required");
    let faults = faults_of(&two, "majority");
    assert!(faults.len() == 1 && faults[0].starts_with("line 11: "), "{faults:?}");
    assert!(faults[0].contains("write \"all\""), "{faults:?}");
    // A third one that does not count changes nothing.
    assert_eq!(faults_of(&(two.clone() + &folder("c", "best-effort")), "majority").len(), 1);
    assert_eq!(faults_of(&(two.clone() + &folder("c", "required")), "majority"), [""; 0]);
    for policy in ["all", "any", "spool"] {
        assert_eq!(faults_of(&two, policy), [""; 0]);
    }
}

#[test]
fn one_location_at_least_is_required() {
    let faults = faults_of(&folder("a", "best-effort"), "any");
    assert!(faults.len() == 1 && faults[0].contains("every location is best-effort"), "{faults:?}");
    let both = folder("a", "best-effort") + &folder("b", "required");
    assert_eq!(faults_of(&both, "any"), [""; 0]);
}

#[test]
fn what_a_location_says_is_read() {
    let text = EXAMPLE.replace(
        "url  = \"s3://acme-backups-eu/orders\"",
        "url = \"s3://acme-backups-eu/orders\"\nrole = \"best-effort\"\nencryption = \"sse-kms\"\n\
         kms-key-id = \"alias/b\"\nstorage-class = \"STANDARD_IA\"\ntls-min = \"1.3\"\n\
         proxy = \"http://me:hunter2@proxy:3128\"\nsingle-writer = true\npath-style = false\n\
         endpoint = \"https://acme-backups-eu.s3.example.com\"",
    );
    let settings = parse(&text).unwrap();
    let location = &settings.locations[0];
    assert_eq!((location.role, location.tls_min), (Role::BestEffort, TlsMin::Tls13));
    assert_eq!(location.encryption, Some(Encryption::Kms(Some("alias/b".into()))));
    assert_eq!(location.storage_class.as_deref(), Some("STANDARD_IA"));
    assert!(location.single_writer && location.path_style == Some(false));
    assert_eq!(settings.required_locations(), 1);
    assert!(!format!("{settings:?}").contains("hunter2"));
}

#[test]
fn keys_of_another_kind_of_store_are_refused_by_name_and_line() {
    let cases = [
        ("file:///a", "proxy = \"http://p\"", "proxy: it is for s3://, gs:// and az:// locations"),
        ("gs://acme/a", "region = \"eu\"", "region: it is for s3:// locations"),
        ("s3://acme/a", "account = \"acme\"", "account: it is for az:// locations"),
        ("az://acme/a", "credentials-file = \"/k.json\"", "credentials-file: it is for gs://"),
        ("s3://acme/a", "tls-min = \"1.1\"", "choose from: 1.2, 1.3"),
        ("s3://acme/a", "kms-key-id = \"k\"", "add: encryption = \"sse-kms\""),
        ("s3://acme/a", "encryption = \"aes\"", "choose from: sse-s3, sse-kms"),
        ("s3://acme/a", "storage-class = \"DEEP_ARCHIVE\"", "cannot be read at once"),
        (
            "az://acme/a",
            "account = \"acme\"\nstorage-class = \"Archive\"",
            "cannot be read at once",
        ),
        ("s3://acme/a", "proxy = \"socks://me:hunter2@p\"", "proxy: not an http or https URL"),
        ("s3://acme/a", "role = \"optional\"", "choose from: required, best-effort"),
        (
            "gs://acme/a",
            "credentials-file = \"/nonexistent.json\"",
            "credentials file /nonexistent.json",
        ),
    ];
    for (url, key, word) in cases {
        let table = format!("[[location]]\nname = \"a\"\nurl = \"{url}\"\n{key}\n");
        let faults = faults_of(&table, "any");
        assert!(faults.len() == 1 && faults[0].contains(word), "{key}: {faults:?}");
        assert!(
            faults[0].starts_with("line 4: ") || faults[0].starts_with("line 5: "),
            "{faults:?}"
        );
        assert!(!faults[0].contains("hunter2"), "{faults:?}");
    }
}
