//! Room in the spool: waited for, or made by giving up the oldest WAL.

use super::{Fault, Pipeline};
use crate::wal::release::release_oldest;
use crate::wal::spool::is_no_space;
use backstay_common::config::OnSpoolFull;
use backstay_common::{Context, Result};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How long a full spool is left alone.
const HOLD: Duration = Duration::from_millis(250);
/// How long it must have been full before anything is given up.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

impl Pipeline {
    /// Waits while the spool holds as much as it may, or makes room.
    pub(super) async fn wait_for_room(&mut self, over: &CancellationToken) -> Result<(), Fault> {
        let max = self.path.context.settings.spool.bytes_max;
        loop {
            let used = self.path.board.read(|state| state.spool_bytes());
            // It stays an alarm while room is made a file at a time.
            if used < max / 10 * 9 {
                self.full_since = None;
                self.path.context.alarms.clear("spool-full", "");
            }
            if used < max {
                return Ok(());
            }
            if !self.make_room("", &format!("the spool holds {used} of {max} bytes"))? {
                hold(over).await?;
            }
        }
    }

    /// Raises the alarm, and gives up the oldest WAL if the operator wants that. False if there is nothing to do but wait.
    fn make_room(&mut self, subject: &str, why: &str) -> Result<bool> {
        let is_release =
            self.path.context.settings.durability.on_spool_full == OnSpoolFull::Release;
        // Locations that are there, and only slow to answer, are waited for.
        let full_since = *self.full_since.get_or_insert_with(Instant::now);
        let uncut = self.withheld.first().map_or(self.cut_from, |(before, _)| *before);
        let is_made = is_release
            && full_since.elapsed() >= RELEASE_PATIENCE
            && release_oldest(&self.path, uncut.min(self.proven))?;
        let what = if is_made { "the oldest WAL is given up" } else { "WAL is left at the server" };
        self.path.context.alarms.raise("spool-full", subject, format!("{why}: {what}"));
        Ok(is_made)
    }

    pub(super) async fn append(
        &mut self,
        bytes: &[u8],
        over: &CancellationToken,
    ) -> Result<(), Fault> {
        if bytes.is_empty() {
            return Ok(());
        }
        loop {
            match self.line.spool.append(bytes) {
                Ok(()) => {
                    self.path.context.alarms.clear("spool-full", "disk");
                    return Ok(());
                }
                Err(error) if is_no_space(&error) => {
                    let folder = self.line.spool.folder();
                    if !self.make_room("disk", &format!("{}: {error}", folder.display()))? {
                        hold(over).await?;
                    }
                }
                Err(error) => {
                    let failed: Result<()> = Err(error).context("append to the spool");
                    return Ok(failed?);
                }
            }
        }
    }
}

async fn hold(over: &CancellationToken) -> Result<(), Fault> {
    tokio::select! {
        () = over.cancelled() => Err(Fault::Held),
        () = tokio::time::sleep(HOLD) => Ok(()),
    }
}
