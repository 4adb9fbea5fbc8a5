//! Where the files of a snapshot go: the target directory, and the tablespaces beside or outside it.
//!
//! What always holds: a path from a manifest leads to a place below the target directory or below one tablespace's new
//! directory, and no symbolic link is followed on the way; the links in `pg_tblspc` are made here.

use backstay_common::snapshot::Tablespace;
use backstay_common::snapshot::table::check_relative;
use backstay_common::{Context, Error, Kind, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// Where tablespaces go unless the operator says otherwise.
pub const TABLESPACES: &str = "backstay-tablespaces";

/// One `--tablespace OLD=NEW`: an OID or the place at the source, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub old: String,
    pub new: PathBuf,
}

impl std::str::FromStr for Mapping {
    type Err = String;

    fn from_str(text: &str) -> Result<Mapping, String> {
        match text.split_once('=') {
            Some((old, new)) if !old.is_empty() && Path::new(new).is_absolute() => {
                Ok(Mapping { old: old.into(), new: new.into() })
            }
            _ => {
                Err("write OLD=NEW: the tablespace's OID or old path, then a new absolute path"
                    .into())
            }
        }
    }
}

/// The places of a restored cluster.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
    tablespaces: BTreeMap<u32, PathBuf>,
}

impl Layout {
    /// `root` is absolute. Every mapping must name a tablespace of the snapshot, and no two places may lie in each other.
    pub fn new(root: PathBuf, known: &[Tablespace], mappings: &[Mapping]) -> Result<Layout> {
        let mut tablespaces = BTreeMap::new();
        for tablespace in known {
            let inside = root.join(TABLESPACES).join(tablespace.oid.to_string());
            let mapped = mappings.iter().find(|mapping| is_meant(mapping, tablespace));
            tablespaces.insert(tablespace.oid, mapped.map_or(inside, |m| m.new.clone()));
        }
        for mapping in mappings {
            if !known.iter().any(|tablespace| is_meant(mapping, tablespace)) {
                return Err(unknown(mapping, known));
            }
        }
        let layout = Layout { root, tablespaces };
        layout.check_apart()?;
        Ok(layout)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Tablespaces by OID, and where they go.
    pub fn tablespaces(&self) -> &BTreeMap<u32, PathBuf> {
        &self.tablespaces
    }

    /// The tablespaces that go outside the target directory.
    pub fn outside(&self) -> impl Iterator<Item = &PathBuf> {
        self.tablespaces.values().filter(|place| !place.starts_with(&self.root))
    }

    /// For a cluster that is restored over: each of its tablespaces that lies outside must have been given a place, for a copy of a
    /// data directory still links to the original's. `outside` is where they are now.
    pub fn check_moves(
        &self,
        outside: &BTreeMap<u32, PathBuf>,
        mappings: &[Mapping],
    ) -> Result<()> {
        for (oid, place) in outside.iter().filter(|(oid, _)| self.tablespaces.contains_key(*oid)) {
            if !mappings.iter().any(|mapping| mapping.new == self.tablespaces[oid]) {
                let reason = format!(
                    "tablespace {oid} of {} is at {}, outside of it",
                    self.root.display(),
                    place.display()
                );
                return Err(Error::new(Kind::Config, reason).remedy(format!(
                    "if no other server uses that place, give --tablespace {oid}={}; else another, empty one",
                    place.display()
                )));
            }
        }
        Ok(())
    }

    fn check_apart(&self) -> Result<()> {
        let mut places = BTreeSet::new();
        for place in self.tablespaces.values() {
            let plain =
                place.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
            let own = place.starts_with(self.root.join(TABLESPACES));
            let nested = !own && (place.starts_with(&self.root) || self.root.starts_with(place));
            let shared =
                places.iter().any(|p: &&PathBuf| p.starts_with(place) || place.starts_with(p));
            if !plain || nested || shared {
                let reason = format!("tablespace directory {}", place.display());
                return Err(Error::new(Kind::Config, format!("{reason} overlaps another directory of the restore"))
                    .remedy("give every tablespace an absolute path of its own, outside the target directory"));
            }
            places.insert(place);
        }
        Ok(())
    }

    /// Where the file or directory `path` of the snapshot goes.
    pub fn resolve(&self, path: &str) -> Result<PathBuf> {
        check_relative(path)?;
        let mut parts = path.splitn(3, '/');
        if parts.next() == Some("pg_tblspc")
            && let Some(place) = parts
                .next()
                .and_then(|oid| oid.parse().ok())
                .and_then(|oid: u32| self.tablespaces.get(&oid))
        {
            return Ok(parts.next().map_or_else(|| place.clone(), |rest| place.join(rest)));
        }
        Ok(self.root.join(path))
    }

    /// Links `pg_tblspc/<oid>` to where each tablespace goes. Links of an earlier attempt are replaced.
    pub fn link_tablespaces(&self) -> Result<()> {
        for (oid, place) in &self.tablespaces {
            let link = self.root.join("pg_tblspc").join(oid.to_string());
            let doing = || format!("link {}", link.display());
            match std::fs::symlink_metadata(&link) {
                Ok(found) if found.is_symlink() => std::fs::remove_file(&link).context(doing())?,
                Ok(found) if found.is_dir() => std::fs::remove_dir(&link).context(doing())?,
                _ => {}
            }
            std::os::unix::fs::symlink(place, &link).context(doing())?;
        }
        Ok(())
    }
}

fn is_meant(mapping: &Mapping, tablespace: &Tablespace) -> bool {
    mapping.old == tablespace.oid.to_string()
        || mapping.old.trim_end_matches('/') == tablespace.location.trim_end_matches('/')
}

fn unknown(mapping: &Mapping, known: &[Tablespace]) -> Error {
    let there: Vec<String> = known.iter().map(|t| format!("{} ({})", t.oid, t.location)).collect();
    let there = if there.is_empty() { "none".to_string() } else { there.join(", ") };
    Error::new(Kind::Config, format!("the snapshot has no tablespace {}", mapping.old))
        .remedy(format!("map one that it has: {there}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<Tablespace> {
        vec![
            Tablespace { oid: 16385, location: "/srv/fast".into() },
            Tablespace { oid: 16386, location: "/srv/slow".into() },
        ]
    }

    #[test]
    fn tablespaces_stay_inside_unless_mapped() {
        let mapping = "/srv/slow/=/mnt/slow".parse().unwrap();
        let layout = Layout::new("/restored".into(), &known(), &[mapping]).unwrap();
        let place = |path: &str| layout.resolve(path).unwrap().display().to_string();
        assert_eq!(place("base/1/2"), "/restored/base/1/2");
        assert_eq!(
            place("pg_tblspc/16385/PG_15/5/9"),
            "/restored/backstay-tablespaces/16385/PG_15/5/9"
        );
        assert_eq!(place("pg_tblspc/16386"), "/mnt/slow");
        assert_eq!(place("pg_tblspc/17000/PG_15"), "/restored/pg_tblspc/17000/PG_15", "in place");
        assert_eq!(layout.outside().count(), 1);
        assert!(layout.resolve("pg_tblspc/16386/../../etc").is_err());
    }

    #[test]
    fn mappings_must_be_known_and_apart() {
        let make = |text: &str| Layout::new("/restored".into(), &known(), &[text.parse().unwrap()]);
        assert!(make("1=/mnt/a").unwrap_err().to_string().contains("16385 (/srv/fast)"));
        for bad in [
            "16385=/restored/base",
            "16385=/",
            "16385=/mnt/../restored",
            "16385=/restored/backstay-tablespaces/16386",
        ] {
            assert_eq!(make(bad).unwrap_err().kind(), Kind::Config, "{bad}");
        }
        for bad in ["16385", "=/x", "16385=relative"] {
            assert!(bad.parse::<Mapping>().is_err(), "{bad}");
        }
    }
}
