//! What the tasks of the WAL path know of each other: one state behind one lock that is held for moments only, and a
//! bell that rings at each change.

use super::frontier::Frontier;
use super::line::Line;
use super::shelf::Shelf;
use super::slot::SlotStatus;
use backstay_common::config::Acknowledge;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::pgtime::PgTime;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::{Notify, watch};

/// The shared state. Lost with the process: the spool and the locations have all that matters.
#[derive(Debug)]
pub struct Board {
    state: Mutex<State>,
    policy: Acknowledge,
    bell: watch::Sender<u64>,
    /// Bytes have come into the spool.
    arrivals: Notify,
}

#[derive(Debug)]
pub struct State {
    pub frontier: Frontier,
    pub shelf: Shelf,
    /// By number. The greatest is the current one, if `current` says so.
    pub lines: BTreeMap<u32, Arc<Line>>,
    /// The line that is being received.
    pub current: u32,
    pub server: Server,
    /// By location.
    pub health: Vec<Health>,
}

/// What is known of PostgreSQL.
#[derive(Clone, Debug, Default)]
pub struct Server {
    pub connected: bool,
    /// It is in recovery.
    pub standing_by: bool,
    /// How far its WAL reached, by its last message.
    pub end: Lsn,
    pub clock: Option<PgTime>,
    /// Its last word that there was no more WAL than so much, at this time of its clock.
    pub quiet: Option<(Lsn, PgTime)>,
    /// Its shutdown checkpoint came then, and nothing after it.
    pub leaving: Option<Instant>,
    /// Our slot, when the server was last asked.
    pub slot: Option<SlotStatus>,
    pub gap: Option<LastGap>,
    pub last_error: Option<String>,
}

/// The last gap that was met, in this life of the agent or before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastGap {
    pub range: LsnRange,
    /// Nobody has its WAL. False where a history was left.
    pub is_lost: bool,
    /// None where it was not known yet.
    pub branch: Option<Branch>,
}

impl LastGap {
    /// True if a snapshot of `branch` may lack WAL for it. A gap on another branch takes nothing from it, nor does a history
    /// that was left.
    pub fn is_lost_on(&self, branch: Option<Branch>) -> bool {
        self.is_lost && (self.branch.is_none() || self.branch == branch)
    }
}

/// How a location fares.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Failures without a success since.
    pub failures: u32,
    pub last_error: Option<String>,
}

impl Board {
    /// For locations that are required or not, in the order of the config.
    pub fn new(required: Vec<bool>, policy: Acknowledge) -> Board {
        let locations = required.len();
        let state = State {
            frontier: Frontier::new(required.clone(), Lsn::INVALID, Lsn::INVALID),
            shelf: Shelf::new(required),
            lines: BTreeMap::new(),
            current: 0,
            server: Server::default(),
            health: vec![Health::default(); locations],
        };
        let (state, bell) = (Mutex::new(state), watch::Sender::new(0));
        Board { state, policy, bell, arrivals: Notify::new() }
    }

    /// Changes the state, brings what follows from it up to date, and rings the bell.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = {
            let mut state = self.state.lock().expect("no panic while held");
            let result = change(&mut state);
            state.settle(self.policy);
            result
        };
        self.ring();
        result
    }

    /// Bytes have come: many times a second, and mostly nobody waits for it but the fsync.
    pub fn receive(&self, change: impl FnOnce(&mut State)) {
        let is_news = {
            let mut state = self.state.lock().expect("no panic while held");
            let before = (state.frontier.acknowledged(), state.server.leaving.is_some());
            change(&mut state);
            state.settle(self.policy);
            before != (state.frontier.acknowledged(), state.server.leaving.is_some())
        };
        self.arrivals.notify_one();
        if is_news {
            self.ring();
        }
    }

    /// Returns when bytes have come since the last time. For one task.
    pub async fn arrival(&self) {
        self.arrivals.notified().await;
    }

    /// Changes what no other task waits for.
    pub fn update_quietly<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().expect("no panic while held"))
    }

    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.lock().expect("no panic while held"))
    }

    pub fn ring(&self) {
        self.bell.send_modify(|rung| *rung = rung.wrapping_add(1));
    }

    /// Rings from now on.
    pub fn listen(&self) -> watch::Receiver<u64> {
        self.bell.subscribe()
    }
}

impl State {
    fn settle(&mut self, policy: Acknowledge) {
        for location in 0..self.health.len() {
            let stored = self.shelf.frontier(location, self.current);
            self.frontier.store(location, stored);
        }
        self.frontier.acknowledge(policy);
    }

    /// Bytes on the local disk.
    pub fn spool_bytes(&self) -> u64 {
        let wal: u64 = self.lines.values().map(|line| line.spool.bytes()).sum();
        wal + self.shelf.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_that_was_left_and_the_gap_of_another_branch_end_no_snapshot() {
        let branch = |text: &str| Some(text.parse::<Branch>().unwrap());
        let (this, other) = (branch("00000001-0000000a"), branch("00000001-0000000b"));
        let range = LsnRange::new(Lsn::new(10), Lsn::new(20));
        let gap = LastGap { range, is_lost: true, branch: this };
        assert!(gap.is_lost_on(this));
        assert!(!gap.is_lost_on(other));
        assert!(LastGap { branch: None, ..gap }.is_lost_on(other));
        assert!(!LastGap { is_lost: false, ..gap }.is_lost_on(this));
    }
}
