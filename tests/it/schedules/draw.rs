//! What happens in a schedule: plain data, drawn from a seed and a number and from nothing else.
//!
//! Steps wait for progress that can be observed (so many more commits, a position acknowledged), never for a time. While a
//! schedule is drawn, a model of the world says which steps make sense, and where commits may rightly stand still.

use backstay_tests::random::Random;
use std::fmt;

/// Locations, and servers with an agent beside each.
pub const LOCATIONS: usize = 3;
pub const HOSTS: usize = 2;

/// Moves drawn between the beginning and the end.
const MOVES: std::ops::Range<u64> = 10..18;
const PROMOTIONS_MAX: u32 = 2;
/// Snapshots asked for by hand; each promotion has one besides.
const SNAPSHOTS_MAX: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Any,
    Majority,
    All,
}

impl Policy {
    /// The word of the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Policy::Any => "any",
            Policy::Majority => "majority",
            Policy::All => "all",
        }
    }

    /// Locations that must have what is acknowledged.
    fn needed(self) -> usize {
        match self {
            Policy::Any => 1,
            Policy::Majority => 2,
            Policy::All => LOCATIONS,
        }
    }
}

/// What is done to a location until it is relieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// Killed: connections are reset, and new ones closed.
    Down,
    /// Some requests end with their connection, closed or reset, before they are done.
    Cut,
    /// Some requests wait, those for a listing longest.
    Delay,
    /// 503 SlowDown to most.
    Throttle,
    /// Of some writes, half arrives; of some answers, half is sent.
    Half,
    /// Some writes are done, and reported as failed or not at all.
    Lie,
    /// Two writes are never answered; one of them is done.
    Hang,
}

const BLOWS: [Blow; 7] =
    [Blow::Down, Blow::Cut, Blow::Delay, Blow::Throttle, Blow::Half, Blow::Lie, Blow::Hang];

/// One step. Hosts and locations are told by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Waits for so many more commits on the newest primary; where they may stand still, only until they do.
    Commits {
        more: usize,
        may_stall: bool,
    },
    /// Waits until all that the newest primary has written by now is acknowledged.
    Acknowledged,
    /// Ends the segment, so that spans fill.
    Segment,
    /// Asks the newest primary's agent for a snapshot, and does not wait for it.
    Snapshot,
    Strike {
        location: usize,
        blow: Blow,
    },
    Relieve {
        location: usize,
    },
    KillServer {
        host: usize,
    },
    StartServer {
        host: usize,
    },
    /// With its state directory, and so its spool, if that is lost.
    KillAgent {
        host: usize,
        state_lost: bool,
    },
    StartAgent {
        host: usize,
    },
    /// The standby no longer follows.
    CutOff,
    /// The primary is killed if it still runs, and the standby takes over.
    Promote,
    /// The old primary becomes a standby of the new one.
    Rejoin,
    /// The old primary starts as if nothing had happened: two servers take writes.
    Return,
}

/// All of one schedule.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub number: u64,
    pub policy: Policy,
    /// Commits wait until they are acknowledged.
    pub synchronous: bool,
    pub flush_interval: &'static str,
    pub steps: Vec<Step>,
    random: Random,
}

impl Schedule {
    /// The same for the same seed (which `random` stands for) and number.
    pub fn draw(random: &Random, number: u64) -> Schedule {
        let random = random.fork(&number.to_string());
        let mut draw = random.fork("steps");
        let policy = *draw.pick(&[Policy::Any, Policy::Majority, Policy::All]);
        let synchronous = draw.one_in(3);
        // Commits that wait are shipped at once, whatever the interval.
        let flush_interval = match synchronous {
            true => "1m",
            false => draw.pick(&["100ms", "300ms", "1s"]),
        };
        let world = World::new(policy, synchronous);
        let steps = Drawing { random: draw, world, steps: Vec::new() }.draw();
        Schedule { number, policy, synchronous, flush_interval, steps, random }
    }

    /// Numbers for a purpose that is not the steps'.
    pub fn random(&self, label: &str) -> Random {
        self.random.fork(label)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Schedule { number, policy, flush_interval, .. } = self;
        let waiting = if self.synchronous { ", commits wait" } else { "" };
        write!(f, "schedule {number}: {}, {flush_interval}{waiting}", policy.word())?;
        self.steps.iter().enumerate().try_for_each(|(n, step)| write!(f, "\n  {n:2} {step:?}"))
    }
}

/// The server that is not the newest primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Other {
    Follows,
    CutOff,
    /// It was the primary, and was killed.
    Fallen,
    /// It was the primary, and is one still.
    Apart,
}

/// What a step does to what is possible afterwards.
#[derive(Debug)]
struct World {
    policy: Policy,
    synchronous: bool,
    primary: usize,
    other: Other,
    /// By host.
    servers: [bool; HOSTS],
    agents: [bool; HOSTS],
    /// By location.
    blows: [Option<Blow>; LOCATIONS],
    /// A write waits there for an answer that never comes.
    hung: [bool; LOCATIONS],
    promotions: u32,
    snapshots: u32,
}

impl World {
    fn new(policy: Policy, synchronous: bool) -> World {
        World {
            policy,
            synchronous,
            primary: 0,
            other: Other::Follows,
            servers: [true; HOSTS],
            agents: [true; HOSTS],
            blows: [None; LOCATIONS],
            hung: [false; LOCATIONS],
            promotions: 0,
            snapshots: 0,
        }
    }

    fn standby(&self) -> usize {
        1 - self.primary
    }

    /// Whether what is written will be acknowledged without help.
    fn flows(&self) -> bool {
        let well = (0..LOCATIONS).filter(|&l| self.blows[l].is_none() && !self.hung[l]).count();
        self.servers[self.primary] && self.agents[self.primary] && well >= self.policy.needed()
    }

    fn commits(&self, more: usize) -> Step {
        Step::Commits { more, may_stall: self.synchronous && !self.flows() }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Strike { location, blow } => {
                self.blows[location] = Some(blow);
                self.hung[location] |= blow == Blow::Hang;
            }
            Step::Relieve { location } => self.blows[location] = None,
            Step::KillServer { host } => self.servers[host] = false,
            Step::StartServer { host } => self.servers[host] = true,
            Step::KillAgent { host, .. } => {
                self.agents[host] = false;
            }
            Step::StartAgent { host } => self.agents[host] = true,
            Step::CutOff => self.other = Other::CutOff,
            Step::Promote => {
                self.servers[self.primary] = false;
                self.primary = self.standby();
                self.other = Other::Fallen;
                self.promotions += 1;
            }
            Step::Rejoin => {
                self.servers[self.standby()] = true;
                self.other = Other::Follows;
            }
            Step::Return => {
                self.servers[self.standby()] = true;
                self.other = Other::Apart;
            }
            Step::Snapshot => self.snapshots += 1,
            Step::Commits { .. } | Step::Acknowledged | Step::Segment => {}
        }
    }
}

#[derive(Debug)]
struct Drawing {
    random: Random,
    world: World,
    steps: Vec<Step>,
}

impl Drawing {
    fn draw(mut self) -> Vec<Step> {
        self.commits(20..60);
        self.push(Step::Acknowledged);
        for _ in 0..self.random.range(MOVES) {
            let moves = self.moves();
            let step = self.weigh(&moves);
            self.push(step);
            if step == Step::Promote && self.world.flows() && !self.random.one_in(3) {
                self.push(Step::Acknowledged);
            }
            if self.world.servers[self.world.primary] && !self.random.one_in(3) {
                self.commits(5..60);
            }
        }
        self.end()
    }

    /// Mostly with all in full flight, and with one location less than the policy needs, so that the last moment has
    /// something to lose.
    fn end(mut self) -> Vec<Step> {
        let primary = self.world.primary;
        if !self.world.servers[primary] {
            self.push(Step::StartServer { host: primary });
        }
        if !self.world.agents[primary] && !self.random.one_in(4) {
            self.push(Step::StartAgent { host: primary });
        }
        self.commits(5..40);
        if !self.random.one_in(3) {
            self.strike_all_but(self.world.policy.needed() - 1);
        }
        self.commits(20..80);
        self.steps
    }

    fn strike_all_but(&mut self, spared: usize) {
        let mut well: Vec<usize> =
            (0..LOCATIONS).filter(|&l| self.world.blows[l].is_none()).collect();
        self.random.shuffle(&mut well);
        for location in well.into_iter().skip(spared) {
            let blow = *self.random.pick(&BLOWS);
            self.push(Step::Strike { location, blow });
        }
    }

    fn push(&mut self, step: Step) {
        self.world.take(step);
        self.steps.push(step);
    }

    fn commits(&mut self, range: std::ops::Range<u64>) {
        let more = self.random.range(range) as usize;
        self.push(self.world.commits(more));
    }

    fn weigh(&mut self, moves: &[(u64, Step)]) -> Step {
        let total = moves.iter().map(|(weight, _)| weight).sum();
        let mut at = self.random.below(total);
        for (weight, step) in moves {
            if at < *weight {
                return *step;
            }
            at -= weight;
        }
        moves[0].1
    }

    /// What makes sense now, with its weight. There is always something.
    fn moves(&mut self) -> Vec<(u64, Step)> {
        let mut moves = self.of_the_primary();
        moves.extend(self.of_the_other());
        for host in 0..HOSTS {
            moves.push(match self.world.agents[host] {
                true => {
                    let state_lost = self.random.one_in(4);
                    let weight = if host == self.world.primary { 3 } else { 1 };
                    (weight, Step::KillAgent { host, state_lost })
                }
                false => (6, Step::StartAgent { host }),
            });
        }
        for location in 0..LOCATIONS {
            moves.push(match self.world.blows[location] {
                None => (2, Step::Strike { location, blow: *self.random.pick(&BLOWS) }),
                Some(_) => (2, Step::Relieve { location }),
            });
        }
        moves
    }

    fn of_the_primary(&mut self) -> Vec<(u64, Step)> {
        let world = &self.world;
        let host = world.primary;
        if !world.servers[host] {
            return vec![(8, Step::StartServer { host })];
        }
        let mut moves = vec![(2, Step::Segment), (2, Step::KillServer { host })];
        if world.flows() {
            moves.push((2, Step::Acknowledged));
        }
        if world.agents[host] && world.snapshots < SNAPSHOTS_MAX {
            moves.push((1, Step::Snapshot));
        }
        moves
    }

    fn of_the_other(&self) -> Vec<(u64, Step)> {
        let world = &self.world;
        let (host, is_up) = (world.standby(), world.servers[world.standby()]);
        let may_promote = is_up && world.promotions < PROMOTIONS_MAX;
        let primary_runs = world.servers[world.primary];
        match world.other {
            Other::Follows if !is_up => vec![(4, Step::StartServer { host })],
            Other::Follows if may_promote && primary_runs => {
                vec![(1, Step::KillServer { host }), (3, Step::CutOff), (2, Step::Promote)]
            }
            Other::Follows if may_promote => vec![(6, Step::Promote)],
            Other::Follows => vec![(1, Step::KillServer { host })],
            Other::CutOff => vec![(12, Step::Promote)],
            Other::Fallen if primary_runs => vec![(4, Step::Rejoin), (2, Step::Return)],
            Other::Fallen => vec![(2, Step::Return)],
            Other::Apart => vec![],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Schedule> {
        (0..200).map(|number| Schedule::draw(&Random::from_seed(1), number)).collect()
    }

    #[test]
    fn a_number_and_a_seed_are_all_there_is_to_it() {
        let again = Schedule::draw(&Random::from_seed(1), 17);
        assert_eq!(all()[17].to_string(), again.to_string());
        let other = Schedule::draw(&Random::from_seed(2), 17);
        assert_ne!(other.to_string(), again.to_string());
    }

    #[test]
    fn everything_that_can_happen_happens_in_two_hundred() {
        let steps: Vec<Step> = all().into_iter().flat_map(|schedule| schedule.steps).collect();
        let count = |wanted: &dyn Fn(&Step) -> bool| steps.iter().filter(|s| wanted(s)).count();
        for blow in BLOWS {
            let with = |s: &Step| matches!(s, Step::Strike { blow: b, .. } if *b == blow);
            assert!(count(&with) >= 20, "{blow:?}: {}", count(&with));
        }
        let least = [
            (100, Step::Promote),
            (40, Step::CutOff),
            (20, Step::Rejoin),
            (15, Step::Return),
            (20, Step::Snapshot),
            (80, Step::KillServer { host: 0 }),
            (20, Step::KillServer { host: 1 }),
            (80, Step::KillAgent { host: 0, state_lost: false }),
            (15, Step::KillAgent { host: 0, state_lost: true }),
            (20, Step::KillAgent { host: 1, state_lost: false }),
        ];
        for (times, step) in least {
            assert!(count(&|s| *s == step) >= times, "{step:?}: {}", count(&|s| *s == step));
        }
        let synchronous = all().iter().filter(|schedule| schedule.synchronous).count();
        assert!((40..90).contains(&synchronous), "{synchronous}");
        for policy in [Policy::Any, Policy::Majority, Policy::All] {
            assert!(all().iter().filter(|schedule| schedule.policy == policy).count() > 40);
        }
    }

    #[test]
    fn nothing_is_waited_for_that_cannot_come() {
        for schedule in all() {
            let mut world = World::new(schedule.policy, schedule.synchronous);
            for step in schedule.steps {
                match step {
                    Step::Commits { more, .. } => {
                        assert!(world.servers[world.primary], "{}", schedule.number);
                        assert_eq!(step, world.commits(more));
                    }
                    Step::Acknowledged => assert!(world.flows(), "{}", schedule.number),
                    _ => {}
                }
                world.take(step);
            }
        }
    }
}
