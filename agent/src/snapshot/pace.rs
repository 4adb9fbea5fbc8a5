//! The pace at which files are read: `max-rate`, shared by all readers.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Nobody sleeps longer without looking whether he is still wanted.
const NAP_MAX: Duration = Duration::from_millis(250);
/// What was not read for a while may be made up for, so long.
const MADE_UP_FOR: Duration = Duration::from_millis(250);

/// Bytes a second, for all threads together.
#[derive(Debug)]
pub struct Pace {
    rate: Option<u64>,
    /// When all that was allowed so far is used up at that rate.
    free_at: Mutex<Instant>,
}

impl Pace {
    /// None: as fast as it goes.
    pub fn new(rate: Option<u64>) -> Pace {
        Pace { rate: rate.map(|rate| rate.max(1)), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may be read, or nobody wants them any more. Blocks.
    pub fn wait(&self, bytes: u64, is_wanted: impl Fn() -> bool) {
        let Some(rate) = self.rate else { return };
        let begin = {
            let mut free_at = self.free_at.lock().expect("no panic while held");
            let now = Instant::now();
            let begin = (*free_at).max(now.checked_sub(MADE_UP_FOR).unwrap_or(now));
            *free_at = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
            begin
        };
        while let Some(left) = begin.checked_duration_since(Instant::now()) {
            if left.is_zero() || !is_wanted() {
                return;
            }
            std::thread::sleep(left.min(NAP_MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_together_keep_the_rate() {
        let pace = Pace::new(Some(1 << 20));
        let started = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..8).for_each(|_| pace.wait(64 << 10, || true)));
            }
        });
        // 2 MiB, of which the last 64 KiB are allowed and not waited for.
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(1900), "{took:?}");
        assert!(took < Duration::from_secs(6), "{took:?}");
    }

    #[test]
    fn a_pause_is_made_up_for_only_in_part() {
        let pace = Pace::new(Some(1 << 20));
        std::thread::sleep(Duration::from_millis(700));
        let started = Instant::now();
        (0..12).for_each(|_| pace.wait(64 << 10, || true));
        assert!(started.elapsed() >= Duration::from_millis(400), "{:?}", started.elapsed());
    }

    #[test]
    fn without_a_rate_or_a_wish_nobody_waits() {
        let started = Instant::now();
        Pace::new(None).wait(u64::MAX, || true);
        let slow = Pace::new(Some(1));
        slow.wait(1 << 20, || true);
        slow.wait(1 << 20, || false);
        assert!(started.elapsed() < Duration::from_millis(500));
    }
}
