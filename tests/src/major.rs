//! Which PostgreSQL majors are on this machine, and where.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// One major version of PostgreSQL and the folder of its programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Major {
    number: u32,
    bin: PathBuf,
}

/// The majors that Backstay works with.
pub const SUPPORTED: [u32; 5] = [14, 15, 16, 17, 18];

impl Major {
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The folder that holds `postgres`, `initdb` and `pg_ctl`; more only in Debian's packages.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number)
    }
}

/// The majors at hand.
#[derive(Debug)]
pub struct Majors;

impl Majors {
    /// What `BACKSTAY_PG` names ("14=/path/bin:15=/path/bin"); without it, what `scripts/lib/postgres`
    /// or Debian put in its place. Ascending.
    pub fn available() -> &'static [Major] {
        static FOUND: OnceLock<Vec<Major>> = OnceLock::new();
        FOUND.get_or_init(|| match std::env::var("BACKSTAY_PG") {
            Ok(list) => parse(&list),
            Err(_) => SUPPORTED.iter().filter_map(|number| look_for(*number)).collect(),
        })
    }

    pub fn get(number: u32) -> Option<Major> {
        Majors::available().iter().find(|major| major.number == number).cloned()
    }

    /// The newest at hand.
    ///
    /// # Panics
    /// If there is none: run `scripts/lib/postgres`.
    pub fn newest() -> Major {
        Majors::available().last().cloned().expect("a PostgreSQL: run scripts/lib/postgres")
    }
}

/// Panics on words that aren't of the form: nobody should believe that majors were tested that weren't.
fn parse(list: &str) -> Vec<Major> {
    let mut majors: Vec<Major> =
        list.split(':').filter(|item| !item.is_empty()).map(parse_one).collect();
    majors.sort_by_key(|major| major.number);
    majors
}

fn parse_one(item: &str) -> Major {
    let parsed = item.split_once('=').and_then(|(number, bin)| {
        Some(Major { number: number.parse().ok()?, bin: PathBuf::from(bin) })
    });
    parsed.filter(|major| major.program("postgres").is_file()).unwrap_or_else(|| {
        panic!("BACKSTAY_PG: {item:?} is not MAJOR=FOLDER with a postgres in it")
    })
}

fn look_for(number: u32) -> Option<Major> {
    let debian = PathBuf::from(format!("/usr/lib/postgresql/{number}/bin"));
    let cached = cache_dir().join(format!("postgresql/{number}/bin"));
    [debian, cached]
        .into_iter()
        .find(|bin| bin.join("postgres").is_file() && bin.join("initdb").is_file())
        .map(|bin| Major { number, bin })
}

/// The same folder as `cache_dir` in `scripts/lib/postgres`.
fn cache_dir() -> PathBuf {
    match (std::env::var_os("BACKSTAY_CACHE"), std::env::var_os("HOME")) {
        (Some(dir), _) => PathBuf::from(dir),
        (None, Some(home)) if !rustix::process::geteuid().is_root() => {
            Path::new(&home).join(".cache/backstay")
        }
        _ => PathBuf::from("/var/cache/backstay"),
    }
}
