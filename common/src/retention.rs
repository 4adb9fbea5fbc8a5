//! Retention: what a location must keep, and what may go. Pure: no I/O and no clock.
//!
//! ```text
//! listing + manifests, begins, origins, pins  = View ─┐
//! window, keep-last, weekly, monthly          = Rules ─┴─► judge ─► Verdict: stays (why), goes (why), WAL needed
//! ```
//!
//! The rules:
//! - **Window.** Each branch with WAL inside the window keeps, on its line (itself and its ancestors, each up to where the next
//!   one left it), the newest usable and trusted snapshot that ended at least [`Rules::margin`] before the window's edge, all
//!   snapshots after it, and all WAL from the segment of its start on. If none is old enough the oldest usable one takes
//!   its place; where no snapshot reaches a branch yet, all its WAL stays.
//! - The newest snapshot never goes, nor do the newest `keep_last`, each with the WAL from its start on.
//! - **Longer-lived.** The oldest trusted snapshot of each of the newest `weekly` weeks and `monthly` months stays, with only
//!   the WAL that makes it consistent.
//! - **Pins** keep their snapshot until they end, and the WAL that they ask for.
//! - **Damage.** The last whole snapshot before one with damaged pages stays until the damage is acknowledged. From then on that
//!   one counts as whole and trusted, and so does a child of it in which no other pages are damaged.
//! - **Running.** A snapshot that has been begun, less than [`Rules::running_max`] ago, keeps its parent and all packs that
//!   are not older than it, unless a later one's manifest says that it was abandoned. Until then one that was interrupted counts as
//!   running, so that the next one can take over what it stored.
//! - **A system that another one has succeeded** (`pg_upgrade`) has no newest snapshot to keep: it goes when its last commit has
//!   left the window, and its longer-lived snapshots when their weeks and months have.
//! - Packs stay while a snapshot that stays names them, origins while anything of their branch is needed. WAL that a longer
//!   object covers may go. Keys stay.
//! - **Leases** stay while a snapshot of an older generation is listed, and the newest always, unless nothing is left of a system
//!   that was succeeded; gaps while WAL on either side of them stays; indexes while WAL of their block does. A snapshot that its agent began when it no longer held the lease is not usable.
//!
//! What always holds: `stays` and `goes` part what is listed; whatever the rules do not speak of stays; more knowledge never
//! is needed to keep a thing. Times are those at which the stores took the objects, never earlier than what happened: so a commit is
//! never taken for older than it is.

mod snapshots;
mod sweep;
mod verdict;
mod view;

pub use verdict::{Acknowledged, DamageHold, Gone, Stays, Verdict};
pub use view::{Seen, View, is_trusted};

use std::time::Duration;

/// See [`Rules::margin`].
const MARGIN_MAX: Duration = Duration::from_secs(3600);
/// A pack may be so much older than the `begin` of the snapshot that it belongs to, for stores whose times are coarse.
const BEGIN_SLACK: Duration = Duration::from_secs(600);

/// What is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How far back recovery must reach.
    pub window: Duration,
    /// A snapshot must have ended so long before the window's edge to be what the window begins with, and what is so little
    /// outside the window counts as inside: clocks disagree. An hour, or the window if that is shorter.
    pub margin: Duration,
    /// Besides: so many of the newest snapshots, at least 1.
    pub keep_last: usize,
    /// Besides: one snapshot for each of so many weeks,
    pub weekly: usize,
    /// and months.
    pub monthly: usize,
    /// How long a snapshot that has been begun counts as running.
    pub running_max: Duration,
    /// The cluster has another system now, and a snapshot of it that can be restored.
    pub is_succeeded: bool,
}

impl Rules {
    /// Nothing but a window.
    pub fn window(window: Duration) -> Rules {
        let running_max = Duration::from_secs(7 * 86_400);
        let margin = window.min(MARGIN_MAX);
        Rules {
            window,
            margin,
            keep_last: 1,
            weekly: 0,
            monthly: 0,
            running_max,
            is_succeeded: false,
        }
    }
}

/// Says of everything that `view` lists whether it stays.
pub fn judge(view: &View, rules: &Rules) -> Verdict {
    let kept = snapshots::judge(view, rules);
    sweep::sweep(view, rules, kept)
}

#[cfg(test)]
mod tests;
