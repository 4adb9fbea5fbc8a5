//! What a location lacks. Pure: names in, names out.

use backstay_common::catalog::cover::merged;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::snapshot::ManifestPlain;
use std::collections::{BTreeMap, BTreeSet};

/// Kinds of objects in the order of the format: what one needs is in an earlier group.
pub const GROUPS: usize = 5;

/// The group of an object; `None` for those that speak of one location.
pub fn group(name: &ObjectName) -> Option<usize> {
    match name {
        ObjectName::Wrap { .. } | ObjectName::Lease { .. } => Some(0),
        ObjectName::Origin { .. } | ObjectName::Begin { .. } | ObjectName::Pin { .. } => Some(1),
        ObjectName::Pack { .. }
        | ObjectName::Wal { .. }
        | ObjectName::Gap { .. }
        | ObjectName::Ledger { .. } => Some(2),
        ObjectName::WalIndex { .. } => Some(3),
        ObjectName::Manifest { .. } => Some(4),
        ObjectName::Cluster
        | ObjectName::Accepted { .. }
        | ObjectName::Head { .. }
        | ObjectName::Condemned { .. } => None,
    }
}

/// True if the copies of an object are equal wherever it is. A lease is each location's own word, made there; one that lacks it
/// takes another's.
pub fn is_equal_everywhere(name: &ObjectName) -> bool {
    group(name).is_some() && !matches!(name, ObjectName::Lease { .. })
}

/// What a location lacks of `all`, in groups that must be stored one after the other.
///
/// WAL counts as there if the location's own objects cover its range, and an index if a larger one does: pieces that a
/// span has superseded do not come back.
pub fn missing(has: &BTreeSet<ObjectName>, all: &BTreeSet<ObjectName>) -> Vec<Vec<ObjectName>> {
    let covered = coverage(has);
    let index = |name: &ObjectName| match name {
        ObjectName::WalIndex { branch, range, .. } => Some((*branch, *range)),
        _ => None,
    };
    let indexes: Vec<(Branch, LsnRange)> = has.iter().filter_map(index).collect();
    let is_covered = |name: &ObjectName| match name {
        ObjectName::WalIndex { branch, range, .. } => {
            indexes.iter().any(|(of, larger)| of == branch && larger.covers(range))
        }
        ObjectName::Wal { branch, range, .. } => covers(&covered, *branch, *range),
        _ => false,
    };
    let mut groups = vec![Vec::new(); GROUPS];
    for name in all.difference(has).filter(|name| !is_covered(name)) {
        if let Some(group) = group(name) {
            groups[group].push(name.clone());
        }
    }
    groups
}

/// The newest snapshot, with the WAL from its beginning on: what a location must have to be of use.
#[derive(Debug)]
pub struct Newest {
    pub manifest: ObjectName,
    pub packs: BTreeSet<ObjectName>,
    pub branch: Branch,
    pub from: Lsn,
}

impl Newest {
    pub fn of(plain: &ManifestPlain) -> Newest {
        let system = plain.system;
        Newest {
            manifest: ObjectName::Manifest { system, snapshot: plain.snapshot },
            packs: plain.packs.iter().map(|entry| entry.name(system)).collect(),
            branch: plain.branch,
            from: plain.wal_needed().start,
        }
    }

    fn needs(&self, name: &ObjectName) -> bool {
        match name {
            ObjectName::Pack { .. } => self.packs.contains(name),
            ObjectName::Manifest { .. } => *name == self.manifest,
            ObjectName::Wal { branch, range, .. } => match *branch == self.branch {
                true => range.end > self.from,
                false => branch.timeline > self.branch.timeline,
            },
            ObjectName::WalIndex { .. } => false,
            _ => true,
        }
    }

    /// Puts before everything else what this snapshot needs, in the order of the format too.
    pub fn first(&self, groups: Vec<Vec<ObjectName>>) -> Vec<Vec<ObjectName>> {
        let split = |group: Vec<ObjectName>| group.into_iter().partition(|name| self.needs(name));
        let (first, rest): (Vec<_>, Vec<_>) = groups.into_iter().map(split).unzip();
        [first, rest].concat()
    }
}

/// The stretches of each branch that a location's objects cover without a hole.
pub type Coverage = BTreeMap<Branch, Vec<LsnRange>>;

pub fn coverage<'a>(names: impl IntoIterator<Item = &'a ObjectName>) -> Coverage {
    let mut branches = Coverage::new();
    for name in names {
        if let ObjectName::Wal { branch, range, .. } = name {
            branches.entry(*branch).or_default().push(*range);
        }
    }
    for ranges in branches.values_mut() {
        *ranges = merged(std::mem::take(ranges).into_iter());
    }
    branches
}

pub fn covers(covered: &Coverage, branch: Branch, range: LsnRange) -> bool {
    covered.get(&branch).is_some_and(|ranges| ranges.iter().any(|there| there.covers(&range)))
}

/// Objects that have not the same size everywhere: one copy at least is not what it should be.
pub fn unequal(listings: &[&BTreeMap<ObjectName, u64>]) -> BTreeSet<ObjectName> {
    let mut sizes: BTreeMap<&ObjectName, u64> = BTreeMap::new();
    let mut found = BTreeSet::new();
    for (name, &size) in listings.iter().flat_map(|listing| listing.iter()) {
        if is_equal_everywhere(name) && *sizes.entry(name).or_insert(size) != size {
            found.insert(name.clone());
        }
    }
    found
}
