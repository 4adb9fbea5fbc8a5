//! Prune: what no moment of the window needs goes, in two steps and a day apart.
//!
//! ```text
//! look (each location) ─► judge ─► mark ─► condemn what is new          condemned/<run>
//!                                    └───► delete what was condemned a day ago, and is marked again
//! ```
//!
//! | file | what it does |
//! |---|---|
//! | `systems` | the server's system, and those that the cluster had before |
//! | `store`, `memory` | what is asked of a location, and what is known of it |
//! | `look` | lists it, and reads what says what is needed and is not known |
//! | `mark` | what neither the location nor all of them together need |
//! | `execute` | condemns, and deletes: manifests first |
//! | `pins` | holds snapshots, and acknowledges damage |
//! | `report` | what was done |
//!
//! What always holds: nothing is deleted that was not marked twice, at least the grace period apart by the store's clock,
//! and the second time just before; that a manifest which is still listed needs; or that a pin holds which was listed when it was
//! looked again. It is looked again just before manifests go, and just after. Of a snapshot that is pinned between that look and
//! its manifest's deletion the manifest may go; the rest stays in that run, and in none after it. A location that cannot be read whole, or whose clock is more than five minutes off ours, is left
//! alone. A crash leaves objects that the next run marks again.

mod execute;
mod look;
mod mark;
mod memory;
pub mod pins;
mod report;
mod store;
mod systems;

pub use memory::{Fact, Memory};
pub use report::{Amount, LocationReport, PruneReport};
pub use store::{AgentStore, Store};
pub use systems::{System, Systems};

use crate::context::AgentContext;
use backstay_common::id::{AgentName, Branch, LocationName, SystemId};
use backstay_common::keys::Epoch;
use backstay_common::lsn::LsnRange;
use backstay_common::pin::{Hold, PinRecord, damage_pin};
use backstay_common::retention::{DamageHold, Rules, Verdict, View, judge};
use backstay_common::{Error, Kind, Result};
use execute::Execution;
use futures::future::join_all;
use jiff::Timestamp;
use look::{Look, look, look_at};
use mark::Window;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How far the clocks of a store and of this host may be apart.
const CLOCK_OFF_MAX: Duration = Duration::from_secs(300);

/// How a run was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneOptions {
    /// Only say what would be done.
    pub dry_run: bool,
    /// A window that is shorter than the last one applied is meant.
    pub accept_window: bool,
}

/// A run over any stores.
#[derive(Debug)]
pub struct Pruner<'a, S> {
    pub stores: &'a [S],
    pub system: SystemId,
    pub agent: &'a AgentName,
    pub rules: Rules,
    pub grace: Duration,
    /// Of the lease that this agent holds.
    pub generation: u64,
    /// What lists and pins are sealed under.
    pub epoch: Arc<Epoch>,
    /// By this host's clock.
    pub now: Timestamp,
}

impl<S: Store> Pruner<'_, S> {
    /// Prunes every location that can be read. What went wrong at one is in the report. Safe to drop at any point.
    pub async fn run(&self, options: PruneOptions) -> PruneReport {
        let mut report = PruneReport { dry_run: options.dry_run, ..PruneReport::default() };
        let mut looks: Vec<(&S, Look)> = Vec::new();
        for (store, looked) in self.look().await {
            match looked {
                Ok(look) => looks.push((store, look)),
                Err(error) => report.fail(store.name(), &error),
            }
        }
        let windows: Vec<Window> = looks
            .iter()
            .map(|(_, look)| Window::choose(look, self.rules.window, options.accept_window))
            .collect();
        let Some((union, together)) = self.together(&looks, &windows) else { return report };
        let held = match options.dry_run {
            true => BTreeMap::new(),
            false => self.hold(&looks, &together).await,
        };
        for ((store, look), window) in looks.into_iter().zip(windows) {
            let execution = Execution {
                store,
                stores: self.stores,
                look,
                union: &union,
                together: &together,
                rules: &self.rules,
                window,
                grace: self.grace,
                generation: self.generation,
                agent: self.agent,
                epoch: &self.epoch,
            };
            let done = match (options.dry_run, held.get(store.name())) {
                (true, _) => Ok(execution.dry_run()),
                (false, Some(refused)) => Err(Error::new(Kind::Storage, refused)),
                (false, None) => execution.run().await,
            };
            match done {
                Ok(done) => report.locations.push(done),
                Err(error) => report.fail(store.name(), &error),
            }
        }
        report
    }

    /// Pins everywhere what is whole, before the snapshot that shows the damage can go, and says again what was acknowledged.
    /// Returns where that failed.
    async fn hold(
        &self,
        looks: &[(&S, Look)],
        together: &Verdict,
    ) -> BTreeMap<LocationName, String> {
        let holds = together.holds.iter().map(|hold| (hold.damaged, 0, self.keeping(hold)));
        let words = together.acknowledged.iter().map(|word| {
            let reason = "nothing is damaged but what was acknowledged in its parent";
            (word.damaged, word.seq, pins::acknowledgement(self, word.damaged, reason))
        });
        let mut failed = BTreeMap::new();
        for (damaged, seq, pin) in holds.chain(words) {
            let sealed = pin.seal(&self.epoch, self.system, damage_pin(damaged), seq);
            for (store, _) in looks {
                match store.put(sealed.clone(), self.epoch.id()).await {
                    Ok(()) => {}
                    // Another agent's words for the same pin.
                    Err(error) if error.kind() == Kind::Corrupt => {}
                    Err(error) => {
                        let error = error.context("pin what has damaged pages whole");
                        failed.insert(store.name().clone(), error.to_string());
                    }
                }
            }
        }
        failed
    }

    fn keeping(&self, hold: &DamageHold) -> PinRecord {
        PinRecord {
            snapshot: hold.whole,
            hold: Hold::Consistent,
            reason: format!("snapshot {} has damaged pages that are whole here", hold.damaged),
            by: self.agent.to_string(),
            made: self.now.as_second(),
            until: None,
            released: false,
            damage: Some(hold.damaged),
            restore: None,
        }
    }

    async fn look(&self) -> Vec<(&S, Result<Look>)> {
        let looks = self.stores.iter().map(|store| async move {
            let looked = look(store, self.stores, self.system).await.and_then(|look| {
                check_clock(store.name().as_str(), look.view.now, self.now)?;
                Ok(look)
            });
            (store, looked)
        });
        join_all(looks).await
    }

    fn together(&self, looks: &[(&S, Look)], windows: &[Window]) -> Option<(View, Verdict)> {
        let views: Vec<View> = looks.iter().map(|(_, look)| look.view.clone()).collect();
        let union = View::union(&views)?;
        let window = windows.iter().map(|window| window.applied).max()?;
        let margin = Rules::window(window).margin;
        let together = judge(&union, &Rules { window, margin, ..self.rules });
        Some((union, together))
    }

    /// What all locations together need; `None` if any of them cannot be read.
    async fn needed(&self) -> Option<Verdict> {
        let looks = self.read().await;
        (looks.len() == self.stores.len()).then(|| self.by_window_applied(looks))?.map(|(_, v)| v)
    }

    /// What those that can be read say together.
    async fn judgement(&self) -> Option<(View, Verdict)> {
        self.by_window_applied(self.read().await)
    }

    /// Those that can be read, also one that takes nothing and so has no clock to show: what it has let go of, or should have,
    /// must not come back from it. Nothing is deleted by this.
    async fn read(&self) -> Vec<(&S, Look)> {
        let looks = self.stores.iter().map(|store| async move {
            let now = store.clock().await.unwrap_or(self.now);
            Some((store, look_at(store, self.stores, self.system, now).await.ok()?))
        });
        join_all(looks).await.into_iter().flatten().collect()
    }

    fn by_window_applied(&self, looks: Vec<(&S, Look)>) -> Option<(View, Verdict)> {
        let choose = |(_, look): &(&S, Look)| Window::choose(look, self.rules.window, false);
        let windows: Vec<Window> = looks.iter().map(choose).collect();
        self.together(&looks, &windows)
    }
}

fn check_clock(location: &str, store: Timestamp, ours: Timestamp) -> Result<()> {
    let off = store.duration_since(ours).unsigned_abs();
    match off <= CLOCK_OFF_MAX {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Local,
            format!("the clock of location {location} is {} s off this host's", off.as_secs()),
        )
        .remedy("set this host's clock; nothing is pruned there until the two agree to 5 minutes")),
    }
}

async fn pruner<'a>(
    context: &'a AgentContext,
    system: &'a System,
    generation: u64,
) -> Result<Pruner<'a, AgentStore>> {
    let rules = context.settings.retention.rules();
    Ok(Pruner {
        stores: &system.stores,
        system: system.id,
        agent: &context.settings.agent,
        rules: Rules { is_succeeded: system.is_succeeded, ..rules },
        grace: context.settings.retention.grace,
        generation,
        epoch: system.epochs.current().await?,
        now: Timestamp::now(),
    })
}

/// Prunes the agent's locations under a generation of the lease, and keeps the alarms about it. That a location is down is
/// another alarm's to say.
pub async fn run(
    context: &AgentContext,
    generation: u64,
    options: PruneOptions,
) -> Result<PruneReport> {
    let own = context.systems.own(context).await;
    let mut report = pruner(context, &own, generation).await?.run(options).await;
    // Whoever holds the lease of the cluster's present system speaks for those that it had before.
    for system in context.systems.others(context).await? {
        report.add(pruner(context, &system, generation).await?.run(options).await);
    }
    if !options.dry_run {
        alarm(context, &report);
    }
    Ok(report)
}

fn alarm(context: &AgentContext, report: &PruneReport) {
    let worth_telling =
        |(location, _): &&(LocationName, String)| !report.unavailable.contains(location);
    for (location, reason) in report.failed.iter().filter(worth_telling) {
        context.alarms.raise("prune-failed", location.as_str(), reason);
    }
    for writer in &context.writers {
        let name = writer.location().name();
        let done: Vec<_> = report.locations.iter().filter(|done| done.location == *name).collect();
        if !done.is_empty() && !report.failed.iter().any(|(failed, _)| failed == name) {
            context.alarms.clear("prune-failed", name.as_str());
        }
        match report.refused_at(name) {
            _ if done.is_empty() => {}
            None => context.alarms.clear("prune-refused", name.as_str()),
            Some(refused) => {
                context.alarms.raise("prune-refused", name.as_str(), refusal(refused));
            }
        }
        match done.iter().any(|done| done.window_refused.is_some()) {
            false if done.is_empty() => {}
            false => context.alarms.clear("window-shorter", name.as_str()),
            true => context.alarms.raise(
                "window-shorter",
                name.as_str(),
                "the window in the config is shorter than the one last applied, which goes on; run `backstay-agent prune --accept-window` if that is meant",
            ),
        }
        for done in done {
            tracing::info!(location = %name, system = %done.system, deleted = %done.deleted, condemned = %done.condemned, left = %done.left, "pruned");
        }
    }
}

fn refusal((left, reason): (Amount, &str)) -> String {
    format!(
        "the store does not delete {left} that nothing needs any more: {reason}; let this agent's identity delete there (what is under an object lock goes when that ends)"
    )
}

/// What the locations that can be read say together of a system: what of it stays and what may go. `None` if none of them can be
/// read. What another one needs, which cannot be read, may be said to go: that is for whoever copies, not for who deletes.
pub async fn judgement(context: &AgentContext, system: &System) -> Option<(View, Verdict)> {
    // It does not depend on who asks.
    pruner(context, system, 0).await.ok()?.judgement().await
}

/// The WAL of the server's system that all locations together need; `None` if that cannot be said now.
pub async fn needed_wal(context: &AgentContext) -> Option<BTreeMap<Branch, Vec<LsnRange>>> {
    Some(needed(context, &context.systems.own(context).await).await?.wal)
}

async fn needed(context: &AgentContext, system: &System) -> Option<Verdict> {
    // What is needed does not depend on who asks.
    pruner(context, system, 0).await.ok()?.needed().await
}

#[cfg(test)]
mod tests;
