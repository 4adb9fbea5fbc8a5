use super::*;
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn parse_with(text: &str, variables: &[(&str, &str)]) -> Result<Conninfo> {
    let find = |name: &str| {
        variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
    };
    let environment =
        Environment { variable: &find, os_user: Some("alice".into()), home: Some("/none".into()) };
    Conninfo::parse_in(text, &environment)
}

fn parse(text: &str) -> Conninfo {
    parse_with(text, &[]).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

fn refused(text: &str) -> String {
    parse_with(text, &[]).expect_err(text).to_string()
}

fn password(info: &Conninfo) -> Option<&str> {
    info.password.as_ref().map(|p| std::str::from_utf8(p.reveal()).unwrap())
}

fn network(name: &str, port: u16) -> Host {
    Host { place: Place::Network { name: Some(name.into()), address: None }, port }
}

fn socket(directory: &str, port: u16) -> Host {
    Host { place: Place::Socket(directory.into()), port }
}

#[test]
fn defaults_are_libpqs() {
    let info = parse("");
    assert_eq!(info.hosts, [socket("/var/run/postgresql", 5432)]);
    assert_eq!((info.user.as_str(), info.dbname.as_str()), ("alice", "alice"));
    assert_eq!(info.ssl.mode, SslMode::Prefer);
    assert_eq!(info.target, TargetSession::Any);
    assert_eq!(info.passfile.as_deref(), Some(Path::new("/none/.pgpass")));
    assert_eq!(info.connect_timeout, Some(Duration::from_secs(10)));
    assert!(info.keepalive.enabled);
    assert_eq!(info.to_string(), "/var/run/postgresql/.s.PGSQL.5432");
}

#[test]
fn pairs_are_quoted_and_escaped_as_in_libpq() {
    let info =
        parse(r"  user = bob password='it\'s \\ a secret' host=db\ 1 dbname='' port = 6000 ");
    assert_eq!(info.user, "bob");
    assert_eq!(info.dbname, "bob", "an empty value is not given");
    assert_eq!(password(&info), Some(r"it's \ a secret"));
    assert_eq!(info.hosts, [network("db 1", 6000)]);
    assert_eq!(parse("user=a user=b").user, "b", "the last holds");
}

#[test]
fn uris_are_decoded() {
    let info = parse(
        "postgresql://b%40b:p%3Aw%2F@[::1]:5433,db2,%2Fvar%2Fsock:7/my%20db?connect_timeout=1&sslmode=require",
    );
    assert_eq!((info.user.as_str(), info.dbname.as_str()), ("b@b", "my db"));
    assert_eq!(password(&info), Some("p:w/"));
    assert_eq!(info.hosts, [network("::1", 5433), network("db2", 5432), socket("/var/sock", 7)]);
    assert_eq!(info.connect_timeout, Some(Duration::from_secs(2)));
    assert_eq!(info.ssl.mode, SslMode::Require);

    assert_eq!(parse("postgres://").hosts, parse("").hosts);
    assert_eq!(parse("postgres:///db?host=/tmp&port=1").hosts, [socket("/tmp", 1)]);
    assert_eq!(parse("postgres://h?ssl=true").ssl.mode, SslMode::Require);
    assert_eq!(parse("postgres://h/?user=x%40y").user, "x@y");
}

#[test]
fn several_hosts_pair_with_ports_and_addresses() {
    let info = parse("host=a,b,/tmp port=1,,3");
    assert_eq!(info.hosts, [network("a", 1), network("b", 5432), socket("/tmp", 3)]);
    assert_eq!(parse("host=a,b port=9").hosts, [network("a", 9), network("b", 9)]);

    let both = parse("host=a,b hostaddr=10.0.0.1,::1");
    let place = Place::Network { name: Some("b".into()), address: Some("::1".parse().unwrap()) };
    assert_eq!(both.hosts[1], Host { place, port: 5432 });
    assert_eq!(parse("hostaddr=::1 port=7").to_string(), "[::1]:7");

    assert!(refused("host=a,b port=1,2,3").contains("3 ports for 2 hosts"));
    assert!(refused("host=a hostaddr=10.0.0.1,10.0.0.2").contains("1 host names for 2"));
}

#[test]
fn every_keyword_is_taken() {
    let info = parse(
        "host=h hostaddr=127.0.0.1 port=5 dbname=d user=u password=p passfile=/pf connect_timeout=0 \
         application_name=app options='-c a=b' sslmode=verify-full sslrootcert=/r sslcert=/c sslkey=/k \
         target_session_attrs=prefer-standby keepalives=0 keepalives_idle=1 keepalives_interval=2 \
         keepalives_count=3 tcp_user_timeout=4000 channel_binding=require fallback_application_name=f",
    );
    assert_eq!(info.connect_timeout, None);
    assert_eq!(info.application_name.as_deref(), Some("app"));
    assert_eq!(info.options.as_deref(), Some("-c a=b"));
    assert_eq!(info.ssl.roots, Some(Roots::File("/r".into())));
    assert_eq!(info.ssl.identity, Some(("/c".into(), "/k".into())));
    assert_eq!(info.target, TargetSession::PreferStandby);
    assert_eq!(info.channel_binding, ChannelBindingPolicy::Require);
    let second = Duration::from_secs(1);
    let expected = Keepalive {
        enabled: false,
        idle: Some(second),
        interval: Some(second * 2),
        count: Some(3),
        user_timeout: Some(second * 4),
    };
    assert_eq!(info.keepalive, expected);
}

#[test]
fn the_environment_fills_what_is_left_out() {
    let environment = [
        ("PGHOST", "e1,e2"),
        ("PGPORT", "1,2"),
        ("PGUSER", "eve"),
        ("PGPASSWORD", "hush"),
        ("PGDATABASE", "edb"),
        ("PGSSLMODE", "disable"),
        ("PGTARGETSESSIONATTRS", "primary"),
        ("PGAPPNAME", "app"),
    ];
    let info = parse_with("dbname=mine", &environment).unwrap();
    assert_eq!(info.hosts, [network("e1", 1), network("e2", 2)]);
    assert_eq!((info.user.as_str(), info.dbname.as_str()), ("eve", "mine"));
    assert_eq!(password(&info), Some("hush"));
    assert_eq!((info.ssl.mode, info.target), (SslMode::Disable, TargetSession::Primary));
    let uri = parse_with("postgres://h:3/", &environment).unwrap();
    assert_eq!((uri.hosts, uri.dbname.as_str()), (vec![network("h", 3)], "edb"));
    assert_eq!(info.with_default_application_name("backstay").application_name(), Some("app"));
    assert_eq!(parse("").with_default_application_name("b").application_name(), Some("b"));
    assert!(parse_with("", &[("PGSERVICE", "x")]).is_err());
}

#[test]
fn faults_are_named() {
    for (text, reason) in [
        ("hots=a", "unknown keyword \"hots\""),
        ("postgres://h?hots=a", "unknown keyword \"hots\""),
        ("service=x", "\"service\" is not supported"),
        ("user", "keyword=value at character 1"),
        ("user=a =b", "keyword=value at character 8"),
        ("user='a", "quote at character 6"),
        ("port=0", "port \"0\""),
        ("port=65536", "port \"65536\""),
        ("port=a", "port \"a\""),
        ("sslmode=on", "sslmode has the unknown value \"on\""),
        ("target_session_attrs=master", "one of any, read-write"),
        ("connect_timeout=soon", "connect_timeout"),
        ("hostaddr=db1", "is not an IP address"),
        ("host=@abstract", "abstract"),
        ("sslcert=/c", "no sslkey"),
        ("sslrootcert=system sslmode=require", "weak sslmode"),
        ("postgres://a%4", "two hex digits"),
        ("postgres://a%zz", "two hex digits"),
        ("postgres://a%00", "%00"),
        ("postgres://a%ff", "valid text"),
        ("postgres://[::1", "bracket"),
        ("postgres://[::1]5", "expected : after ]"),
        ("postgres://h?user", "keyword=value"),
        ("postgres://h?user=a=b", "keyword=value"),
    ] {
        let error = parse_with(text, &[]).expect_err(text);
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().contains(reason), "{text:?} gave {error}");
    }
    assert_eq!(parse("sslrootcert=system").ssl.mode, SslMode::VerifyFull);
}

#[test]
fn passwords_are_never_shown() {
    let info = parse("password=hunter2 host=h");
    assert!(!format!("{info:?} {info}").contains("hunter2"));
    for text in [
        "password='hunter2",
        "password=a hunter2",
        "postgres://u:hunter2%@h",
        "postgres://h?password=hunter2=x",
    ] {
        assert!(!refused(text).contains("hunter2"), "{text:?}");
    }
}

fn passfile(content: &str, mode: u32) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pgpass");
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    let path = path.display().to_string();
    (directory, path)
}

#[test]
fn the_first_line_that_fits_has_the_password() {
    let lines = "#db1:*:*:*:comment\nshort:line\ndb1:5432:shop:bob:first\ndb1:*:*:bob:se\\:co\\\\nd\n\
                 localhost:*:*:*:local\n/tmp:*:*:*:tmp\n10.0.0.1:*:*:*:addr\n\\::1:1:*:*:six\n";
    let (_directory, path) = passfile(lines, 0o600);
    let find = |text: &str| {
        let info = parse(&format!("{text} passfile={path}"));
        let found = info.password_for(&info.hosts[0], &info.dbname).unwrap();
        found.map(|p| String::from_utf8(p.reveal().to_vec()).unwrap())
    };
    let some = |text: &str| Some(text.to_string());
    assert_eq!(find("host=db1 user=bob dbname=shop"), some("first"));
    assert_eq!(find("host=db1 user=bob dbname=other"), some("se:co\\nd"));
    assert_eq!(find("host=db1 user=eve"), None);
    assert_eq!(find("user=bob"), some("local"));
    assert_eq!(find("host=/tmp"), some("tmp"));
    assert_eq!(find("hostaddr=10.0.0.1"), some("addr"));
    assert_eq!(find("host=db1 user=bob dbname=shop password=given"), some("given"));
}

#[test]
fn a_passfile_that_others_can_read_is_refused() {
    let (_directory, path) = passfile("*:*:*:*:secret\n", 0o640);
    let info = parse(&format!("passfile={path}"));
    let error = info.password_for(&info.hosts[0], "x").unwrap_err();
    assert!(error.to_string().contains("chmod 0600"), "{error}");
    let info = parse("passfile=/nowhere/at/all");
    assert!(info.password_for(&info.hosts[0], "x").unwrap().is_none(), "no file is no error");
}

proptest! {
    #[test]
    fn any_text_is_judged(text: String) {
        let _ = parse_with(&text, &[]);
        let _ = parse_with(&format!("postgres://{text}"), &[]);
    }

    #[test]
    fn any_password_survives_quoting(secret in "[^\0]{1,40}") {
        let quoted = secret.replace('\\', "\\\\").replace('\'', "\\'");
        let info = parse(&format!("password='{quoted}' host=h"));
        prop_assert_eq!(password(&info), Some(secret.as_str()));
        let encoded: String = secret.bytes().map(|b| format!("%{b:02X}")).collect();
        let info = parse(&format!("postgres://u:{encoded}@h"));
        prop_assert_eq!(password(&info), Some(secret.as_str()));
    }
}
