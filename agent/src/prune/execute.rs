//! Carries out what has been marked at one location: condemns what is new, deletes what is due.
//!
//! Each step may be the last. A list of what is condemned changes nothing by itself; manifests go before what they need, and
//! what is left over is marked again by the next run.

use super::look::{Look, look_again};
use super::mark::{Marked, Window, condemned_since, mark};
use super::report::{Amount, LocationReport};
use super::store::Store;
use backstay_common::condemned::{Condemned, NAMES_MAX};
use backstay_common::id::AgentName;
use backstay_common::keys::Epoch;
use backstay_common::location::{is_denied, is_under_lock};
use backstay_common::name::ObjectName;
use backstay_common::retention::{Gone, Rules, Verdict, View};
use backstay_common::{Context, Error, Result};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Objects deleted with one call.
const BATCH: usize = 1000;
/// What a store failed to delete is tried again then; not what it refuses.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// One location on its way.
#[derive(Debug)]
pub struct Execution<'a, S> {
    pub store: &'a S,
    /// All locations, for what is damaged at this one.
    pub stores: &'a [S],
    pub look: Look,
    /// All locations together, and what they need.
    pub union: &'a View,
    pub together: &'a Verdict,
    pub rules: &'a Rules,
    pub window: Window,
    pub grace: Duration,
    /// Of the lease.
    pub generation: u64,
    pub agent: &'a AgentName,
    pub epoch: &'a Arc<Epoch>,
}

/// What to do with what may go.
#[derive(Debug, Default)]
struct Plan {
    due: Vec<ObjectName>,
    /// Condemned, and not yet due.
    waiting: Vec<ObjectName>,
    new: Vec<ObjectName>,
    /// Lists that are done with.
    lists: Vec<ObjectName>,
    next_due: Option<Timestamp>,
}

impl<S: Store> Execution<'_, S> {
    /// What is marked now.
    pub fn marked(&self) -> Marked {
        mark(&self.look, self.union, self.window, self.rules, self.together)
    }

    /// What would be done.
    pub fn dry_run(&self) -> LocationReport {
        let marked = self.marked();
        let plan = self.plan(&marked);
        let mut report = marked.report(self.store.name(), &self.look, true);
        self.count(&plan, &mut report);
        report.deleted = self.amount(&plan.due);
        report
    }

    /// Condemns and deletes. Safe to drop, and to do again, at any point.
    pub async fn run(mut self) -> Result<LocationReport> {
        let marked = self.marked();
        let plan = self.plan(&marked);
        let mut report = marked.report(self.store.name(), &self.look, false);
        self.count(&plan, &mut report);
        self.condemn(&plan).await?;
        // Our own bookkeeping, which nobody else reads.
        self.store
            .delete(&plan.lists)
            .await
            .unwrap_or_else(|error| tracing::debug!(%error, "lists are left"));
        if !plan.due.is_empty() {
            self.delete(plan.due, &mut report).await?;
        }
        Ok(report)
    }

    fn plan(&self, marked: &Marked) -> Plan {
        let since = condemned_since(&self.look, self.generation);
        let mut plan = Plan::default();
        for (name, why) in &marked.goes {
            if *why == Gone::Condemned {
                plan.lists.push(name.clone());
                continue;
            }
            let Some(at) = since.get(name) else {
                plan.new.push(name.clone());
                continue;
            };
            match at.checked_add(self.grace) {
                Ok(due) if due <= self.look.view.now => plan.due.push(name.clone()),
                due => {
                    plan.waiting.push(name.clone());
                    plan.next_due = [plan.next_due, due.ok()].into_iter().flatten().min();
                }
            }
        }
        if !plan.new.is_empty() {
            let due = self.look.view.now.checked_add(self.grace).ok();
            plan.next_due = [plan.next_due, due].into_iter().flatten().min();
        }
        plan
    }

    fn count(&self, plan: &Plan, report: &mut LocationReport) {
        report.condemned = self.amount(&plan.new);
        report.waiting = self.amount(&plan.waiting);
        report.next_due = plan.next_due;
    }

    fn amount(&self, names: &[ObjectName]) -> Amount {
        let mut amount = Amount::default();
        for name in names {
            amount.add(self.look.view.objects.get(name).map_or(0, |seen| seen.size));
        }
        amount
    }

    /// Also when nothing is new, if the window is: the list is what remembers it.
    async fn condemn(&self, plan: &Plan) -> Result<()> {
        let mut batches: Vec<&[ObjectName]> = plan.new.chunks(NAMES_MAX).collect();
        if batches.is_empty() && self.window.is_new {
            batches.push(&[]);
        }
        for names in batches {
            let list = Condemned {
                agent: self.agent.clone(),
                generation: self.generation,
                window: self.window.applied.as_secs(),
                made: Timestamp::now().as_second(),
                names: names.iter().map(ToString::to_string).collect(),
            };
            let sealed = list.seal(self.epoch, self.look.view.system);
            self.store.put(sealed, self.epoch.id()).await.context("condemn")?;
        }
        Ok(())
    }

    /// Manifests first. Before them and after them it is looked again who holds what, and only what is still unneeded goes.
    async fn delete(&mut self, due: Vec<ObjectName>, report: &mut LocationReport) -> Result<()> {
        let (mut first, rest): (Vec<_>, Vec<_>) = due.into_iter().partition(|name| {
            matches!(name, ObjectName::Manifest { .. } | ObjectName::Begin { .. })
        });
        if !first.is_empty() {
            look_again(self.store, self.stores, &mut self.look).await?;
            let marked = self.marked();
            first.retain(|name| marked.goes.contains_key(name));
        }
        let mut refusals = self.in_batches(&first).await;
        let present = look_again(self.store, self.stores, &mut self.look).await?;
        let marked = self.marked();
        let held = self.held(&present);
        let rest =
            rest.into_iter().filter(|name| marked.goes.contains_key(name) && !held.contains(name));
        let mut rest: Vec<ObjectName> = rest.collect();
        rest.sort_by_key(order);
        refusals.extend(self.in_batches(&rest).await);
        let all: Vec<ObjectName> = first.into_iter().chain(rest).collect();
        let left: BTreeSet<ObjectName> = match refusals.is_empty() {
            true => BTreeSet::new(),
            false => self.still_there(&all).await?,
        };
        let (left, deleted): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|name| left.contains(name));
        (report.left, report.deleted) = (self.amount(&left), self.amount(&deleted));
        if left.is_empty() {
            return Ok(());
        }
        let refused = refusals.iter().find(|error| is_denied(error));
        report.refused = refused.map(|error| error.message().to_string());
        if refusals.iter().any(|error| !is_denied(error) && !is_under_lock(error)) {
            let soon = self.look.view.now.checked_add(AGAIN_AFTER).ok();
            report.next_due = [report.next_due, soon].into_iter().flatten().min();
        }
        Ok(())
    }

    /// Why not all is deleted: of each batch the first reason.
    async fn in_batches(&self, names: &[ObjectName]) -> Vec<Error> {
        let mut refusals = Vec::new();
        for batch in names.chunks(BATCH) {
            if let Err(error) = self.store.delete(batch).await {
                tracing::warn!(location = %self.store.name(), "not all is deleted: {}", error.message());
                refusals.push(error);
            }
        }
        refusals
    }

    /// What the manifests that are listed need, whether they may go or not.
    fn held(&self, present: &BTreeSet<ObjectName>) -> BTreeSet<ObjectName> {
        let system = self.look.view.system;
        let mut held = BTreeSet::new();
        let mut needed = BTreeMap::new();
        for name in present {
            let ObjectName::Manifest { snapshot, .. } = name else { continue };
            let Some(plain) = self.look.view.manifests.get(snapshot) else { continue };
            held.extend(plain.packs.iter().map(|pack| pack.name(system)));
            held.insert(ObjectName::Origin { system, branch: plain.branch });
            needed.entry(plain.branch).or_insert_with(Vec::new).push(plain.wal_needed());
        }
        for name in self.look.view.objects.keys() {
            let ObjectName::Wal { branch, range, .. } = name else { continue };
            let ranges = needed.get(branch).map_or(&[][..], Vec::as_slice);
            let is_superseded = self.together.goes.get(name) == Some(&Gone::Superseded);
            if !is_superseded && ranges.iter().any(|r| r.start < range.end && range.start < r.end) {
                held.insert(name.clone());
            }
        }
        held
    }

    async fn still_there(&self, names: &[ObjectName]) -> Result<BTreeSet<ObjectName>> {
        let folder = backstay_common::name::folder::system(self.look.view.system);
        let listed = self.store.list(&folder).await?;
        let present: BTreeSet<ObjectName> = listed.into_iter().filter_map(|l| l.name).collect();
        Ok(names.iter().filter(|name| present.contains(*name)).cloned().collect())
    }
}

/// Packs before WAL, and a branch's origin after its WAL.
fn order(name: &ObjectName) -> u8 {
    match name {
        ObjectName::Pack { .. } => 0,
        ObjectName::Wal { .. } => 1,
        ObjectName::Head { .. } => 2,
        ObjectName::Origin { .. } => 3,
        _ => 4,
    }
}
