//! Random schedules: servers, agents and locations are killed and come back, standbys are promoted, stores cut, delay, reset, throttle,
//! half-deliver and lie; then all servers are destroyed at one moment, and of the locations only those are kept that the
//! policy requires. No acknowledged transaction may ever be missing, on any branch.
//!
//! ```text
//! draw       a schedule: plain data, from the seed and its number
//! template   what each begins with, made once for each major and copied
//! stage      plays the steps
//! watch      what was acknowledged meanwhile, as promises
//! verdict    what is kept, restored and judged
//! ```
//!
//! `./scripts/test --full` plays all 200, the fast suite none: some that promote a standby still fail.
//! `BACKSTAY_SCHEDULES=17..18` plays those of a range, so that `BACKSTAY_SCHEDULES=N..M ./scripts/test --full --seed S schedules`
//! repeats what a failure has printed. The draw is the same each time. How the programs, the kernel and the clock fit
//! themselves in between is not, so one that failed may want several tries.

mod draw;
mod stage;
mod template;
mod verdict;
mod watch;

use anyhow::{Context, Result};
use backstay_tests::major::{Major, Majors};
use backstay_tests::random::{Random, seed};
use backstay_tests::scene::{Scene, play};
use draw::Schedule;
use stage::Stage;
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;
use template::Template;
use verdict::Verdict;

const ALL: Range<u64> = 0..200;
/// Played at the same time.
const AT_ONCE: usize = 2;

#[test]
#[ignore = "takes an hour: ./scripts/test --full"]
fn nothing_acknowledged_is_ever_missing() {
    let range = chosen();
    let run = Run::default();
    let next = AtomicU64::new(range.start);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= range.end {
                return;
            }
            run.play(number);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().expect("failures are caught");
        }
    });
    let failed = run.failed.into_inner().expect("failures are caught");
    assert!(failed.is_empty(), "of schedules {range:?}, these failed: {failed:?}; seed {}", seed());
}

/// The numbers of the schedules to be played.
fn chosen() -> Range<u64> {
    match std::env::var("BACKSTAY_SCHEDULES") {
        Err(_) => ALL,
        Ok(text) => {
            let numbers = text
                .split_once("..")
                .and_then(|(from, to)| Some(from.parse::<u64>().ok()?..to.parse::<u64>().ok()?));
            numbers.filter(|range| !range.is_empty()).unwrap_or_else(|| {
                panic!("BACKSTAY_SCHEDULES={text}: write a range of numbers such as 0..20")
            })
        }
    }
}

/// What the schedules of a run share.
#[derive(Debug, Default)]
struct Run {
    templates: Mutex<BTreeMap<u32, Arc<OnceLock<Template>>>>,
    failed: Mutex<Vec<u64>>,
}

impl Run {
    /// Plays one; if it fails, says how to repeat it.
    fn play(&self, number: u64) {
        let schedule = Schedule::draw(&Random::of("schedules"), number);
        let majors = Majors::available();
        assert!(!majors.is_empty(), "no PostgreSQL is here: run scripts/lib/postgres");
        let major = schedule.random("major").pick(majors).clone();
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| self.play_on(&schedule, &major)));
        let took = began.elapsed().as_secs_f32();
        match result {
            Ok(Verdict { restores, kept, left_out }) => tell(&format!(
                "schedule {number} on {major}: {restores} restores, {kept} kept, {left_out} not promised, {took:.1} s"
            )),
            Err(_) => {
                self.failed.lock().expect("failures are caught").push(number);
                let next = number + 1;
                tell(&format!(
                    "FAILED: BACKSTAY_SEED={} BACKSTAY_SCHEDULES={number}..{next} repeats it, on PostgreSQL {major}, after {took:.1} s\n{schedule}",
                    seed()
                ));
            }
        }
    }

    fn play_on(&self, schedule: &Schedule, major: &Major) -> Verdict {
        let template = self.template(major);
        let template = template.get_or_init(|| Template::make(major));
        let judged = Mutex::new(Verdict::default());
        let name = format!("schedules::{}::pg{major}", schedule.number);
        play(&name, async |scene: &Scene| {
            let verdict = perform(scene, schedule, major, template).await?;
            *judged.lock().expect("nobody else has it") = verdict;
            Ok(())
        });
        judged.into_inner().expect("nobody else has it")
    }

    fn template(&self, major: &Major) -> Arc<OnceLock<Template>> {
        let mut templates = self.templates.lock().expect("nothing panics inside");
        templates.entry(major.number()).or_default().clone()
    }
}

async fn perform(
    scene: &Scene,
    schedule: &Schedule,
    major: &Major,
    template: &Template,
) -> Result<Verdict> {
    let mut stage = Stage::set(scene, schedule, major, template).await.context("set the stage")?;
    stage.play().await?;
    let outcome = stage.end().await.context("the end")?;
    verdict::reach(scene, schedule, major, &template.key(), &outcome).await
}

/// At once, and whatever becomes of what the test prints.
fn tell(line: &str) {
    // Nobody may be listening.
    let _ = writeln!(std::io::stderr(), "{line}");
}
