//! Plays a schedule's steps: two servers with an agent beside each, three locations, a ledger for each reign.
//!
//! A reign is a server's time as a primary on one timeline: it has commits of its own, and at the end a branch of its own to
//! be restored. Everything that is killed is killed with SIGKILL.

use super::draw::{Blow, HOSTS, LOCATIONS, Schedule, Step};
use super::template::{AGENTS, SERVERS, Template, load, locations};
use super::watch::{Promise, Told, Watch};
use crate::folder;
use crate::site::PATIENCE;
use anyhow::{Context, Result, ensure};
use backstay_common::id::Branch;
use backstay_common::lsn::Lsn;
use backstay_common::segment::TimelineId;
use backstay_tests::bucket::{Action, Bucket, Fault, Operation};
use backstay_tests::ledger::Ledger;
use backstay_tests::major::Major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Configuration, Deployment};
use backstay_tests::scene::Scene;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// What rightly stands still is looked at for so long.
const STALL: Duration = Duration::from_millis(400);
/// A location that was away for long is tried again only now and then, on a busy machine.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);
/// Old and new primary in turn: either's agent will do.
const SYNCHRONOUS: &str = "ANY 1 (backstay_a, backstay_b)";

#[derive(Debug)]
struct Host {
    server: Cluster,
    deployment: Deployment,
    agent: Option<Agent>,
}

/// A server's time as a primary.
#[derive(Debug)]
pub struct Reign {
    pub timeline: TimelineId,
    /// Where it began, or behind.
    pub begin: Lsn,
    pub ledger: Ledger,
    told: Told,
}

/// What is left to be judged.
#[derive(Debug)]
pub struct Outcome {
    pub reigns: Vec<Reign>,
    pub promises: BTreeMap<Branch, Promise>,
    pub buckets: [Bucket; LOCATIONS],
}

impl Reign {
    async fn of(server: &Cluster, ledger: Ledger) -> Result<Reign> {
        let row =
            "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8), pg_current_wal_insert_lsn()";
        let rows = server.connect().await?.rows(row).await?;
        let [timeline, begin] = &rows[0][..] else { anyhow::bail!("the server tells nothing") };
        let timeline = u32::from_str_radix(timeline, 16)?;
        let mut told = Told::default();
        told.watch(server.address());
        Ok(Reign {
            timeline: TimelineId::new(timeline).context("a timeline")?,
            begin: begin.parse().ok().context("a position")?,
            ledger,
            told,
        })
    }

    /// The most that its server was told.
    pub fn told(&self) -> Lsn {
        self.told.position()
    }
}

/// Everything on the stage. What still runs when it is dropped is killed.
#[derive(Debug)]
pub struct Stage<'s> {
    scene: &'s Scene,
    schedule: &'s Schedule,
    buckets: [Bucket; LOCATIONS],
    hosts: [Host; HOSTS],
    reigns: Vec<Reign>,
    /// The host of the newest primary; its reign is the last.
    primary: usize,
    /// The index of each host's last reign.
    last_reign: [Option<usize>; HOSTS],
    watch: Watch,
    asked: Vec<JoinHandle<()>>,
}

impl<'s> Stage<'s> {
    /// A copy of the template, running, with nobody writing yet.
    pub async fn set(
        scene: &'s Scene,
        schedule: &'s Schedule,
        major: &Major,
        template: &Template,
    ) -> Result<Stage<'s>> {
        let buckets = [Bucket::start().await, Bucket::start().await, Bucket::start().await];
        for (bucket, objects) in buckets.iter().zip(&template.objects) {
            objects.iter().for_each(|(key, bytes)| bucket.replace(key, bytes.clone()));
            bucket.faults().seed(schedule.random("chances").next());
        }
        let mut servers = Vec::new();
        for (host, name) in SERVERS.iter().enumerate() {
            folder::copy(&template.data(host), &scene.path(name))?;
            servers.push(Cluster::of(scene, major, &scene.path(name))?);
        }
        servers[0].start().await?;
        servers[1].follow(scene, &servers[0], &format!("follows_{}", SERVERS[1]))?;
        servers[1].start().await?;
        let start = Configuration::default()
            .acknowledge(schedule.policy.word())
            .flush_interval(schedule.flush_interval)
            .key(&template.key());
        let start = locations(start, &buckets);
        let mut hosts = Vec::new();
        for (server, name) in servers.into_iter().zip(AGENTS) {
            let configuration = start.clone().server(&server).agent(name);
            let deployment = Deployment::new(scene, name, &configuration).await?;
            hosts.push(Host { server, deployment, agent: None });
        }
        folder::copy(&template.state(), &hosts[0].deployment.state_dir())?;
        for host in &mut hosts {
            host.agent = Some(Agent::start(&host.deployment).await?);
        }
        let state_dirs = hosts.iter().map(|host| host.deployment.state_dir()).collect();
        let hosts: [Host; HOSTS] = hosts.try_into().ok().context("two hosts")?;
        let ledger = Ledger::found(load(), schedule.random("ledger"));
        let mut stage = Stage {
            scene,
            schedule,
            buckets,
            hosts,
            reigns: Vec::new(),
            primary: 0,
            last_reign: [None; HOSTS],
            watch: Watch::start(state_dirs),
            asked: Vec::new(),
        };
        stage.begin_reign(0, ledger).await?;
        Ok(stage)
    }

    /// Everything on it, playing step after step; the step that failed is in the error.
    pub async fn play(&mut self) -> Result<()> {
        for (number, step) in self.schedule.steps.iter().enumerate() {
            self.step(*step).await.with_context(|| format!("step {number}, {step:?}"))?;
            self.all_alive().with_context(|| format!("after step {number}, {step:?}"))?;
        }
        Ok(())
    }

    /// Kills everything at one moment.
    pub async fn end(mut self) -> Result<Outcome> {
        for host in &mut self.hosts {
            if let Some(agent) = &mut host.agent {
                agent.kill()?;
            }
        }
        for host in &mut self.hosts {
            host.server.destroy()?;
        }
        self.asked.iter().for_each(JoinHandle::abort);
        for reign in &mut self.reigns {
            reign.ledger.stop().await?;
        }
        for bucket in &self.buckets {
            bucket.faults().cut();
            bucket.faults().clear();
        }
        let promises = self.watch.promises();
        Ok(Outcome { reigns: self.reigns, promises, buckets: self.buckets })
    }

    async fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Commits { more, may_stall } => self.commits(more, may_stall).await,
            Step::Acknowledged => self.acknowledged().await,
            Step::Segment => self.sql("SELECT pg_switch_wal()").await,
            Step::Snapshot => {
                self.ask_for_snapshot();
                Ok(())
            }
            Step::Strike { location, blow } => {
                strike(&self.buckets[location], blow);
                Ok(())
            }
            Step::Relieve { location } => {
                self.buckets[location].faults().clear();
                Ok(())
            }
            Step::KillServer { host } => self.hosts[host].server.kill(),
            Step::StartServer { host } => self.hosts[host].server.start().await,
            Step::KillAgent { host, state_lost } => self.kill_agent(host, state_lost),
            Step::StartAgent { host } => self.start_agent(host).await,
            Step::CutOff => self.hosts[1 - self.primary].server.cut_off(PATIENCE).await,
            Step::Promote => self.promote().await,
            Step::Rejoin => self.rejoin().await,
            Step::Return => self.old_primary_returns().await,
        }
    }

    fn server(&self) -> &Cluster {
        &self.hosts[self.primary].server
    }

    fn reign(&self) -> Result<&Reign> {
        self.reigns.last().context("a reign")
    }

    async fn sql(&self, statement: &str) -> Result<()> {
        self.server().sql(statement).await
    }

    async fn commits(&self, more: usize, may_stall: bool) -> Result<()> {
        let ledger = &self.reign()?.ledger;
        if !may_stall {
            return ledger.wait_for(more, PATIENCE).await;
        }
        let goal = ledger.acknowledged() + more;
        let (mut last, mut since) = (ledger.acknowledged(), Instant::now());
        while last < goal && since.elapsed() < STALL {
            tokio::time::sleep(POLL).await;
            if ledger.acknowledged() > last {
                (last, since) = (ledger.acknowledged(), Instant::now());
            }
        }
        Ok(())
    }

    async fn acknowledged(&self) -> Result<()> {
        let end = self.server().flushed().await?;
        let (reign, deadline) = (self.reign()?, Instant::now() + ACKNOWLEDGED_WITHIN);
        while reign.told() < end {
            ensure!(
                Instant::now() < deadline,
                "the server was told of {} and not of {end}",
                reign.told()
            );
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    fn ask_for_snapshot(&mut self) {
        let deployment = self.hosts[self.primary].deployment.clone();
        self.asked.push(tokio::spawn(async move {
            // It may fail, as locations and agents do.
            let _ = deployment.agent_command(&["snapshot"]).await;
        }));
    }

    fn kill_agent(&mut self, host: usize, state_lost: bool) -> Result<()> {
        let host = &mut self.hosts[host];
        host.agent.take().context("an agent")?.kill()?;
        if state_lost {
            match std::fs::remove_dir_all(host.deployment.state_dir()) {
                // Killed before it had made one.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    async fn start_agent(&mut self, host: usize) -> Result<()> {
        let host = &mut self.hosts[host];
        host.agent = Some(Agent::spawn(&host.deployment)?);
        Ok(())
    }

    async fn promote(&mut self) -> Result<()> {
        let old = self.primary;
        if self.hosts[old].server.is_running() {
            self.hosts[old].server.kill()?;
        }
        let reign = self.reigns.last_mut().context("a reign")?;
        reign.ledger.stop().await?;
        reign.told.pause();
        let new = 1 - old;
        let server = &self.hosts[new].server;
        server.promote().await?;
        let random = self.schedule.random(&format!("reign {}", self.reigns.len()));
        let ledger = self.reign()?.ledger.forked(&server.connect().await?, random).await?;
        self.primary = new;
        self.begin_reign(new, ledger).await
    }

    async fn begin_reign(&mut self, host: usize, mut ledger: Ledger) -> Result<()> {
        let server = &self.hosts[host].server;
        if self.schedule.synchronous {
            make_synchronous(server).await?;
        }
        ledger.start(server);
        self.reigns.push(Reign::of(server, ledger).await?);
        self.last_reign[host] = Some(self.reigns.len() - 1);
        self.watch.reigns(host, true);
        Ok(())
    }

    async fn rejoin(&mut self) -> Result<()> {
        self.watch.reigns(1 - self.primary, false);
        let [first, second] = &mut self.hosts;
        let (old, new) = if self.primary == 0 { (second, first) } else { (first, second) };
        // A name for each time: its slot may be there already.
        let name = format!("again{}", self.reigns.len());
        match old.server.major().program("pg_rewind").exists() {
            true => old.server.rewind(self.scene, &new.server, &name).await,
            false => old.server.copy_anew(self.scene, &new.server, &name).await,
        }
    }

    async fn old_primary_returns(&mut self) -> Result<()> {
        let old = 1 - self.primary;
        self.hosts[old].server.start().await?;
        let reign = &mut self.reigns[self.last_reign[old].context("it has reigned")?];
        reign.told.watch(self.hosts[old].server.address());
        reign.ledger.start(&self.hosts[old].server);
        Ok(())
    }

    /// No agent has ended by itself.
    fn all_alive(&mut self) -> Result<()> {
        for (host, name) in self.hosts.iter_mut().zip(AGENTS) {
            if let Some(agent) = &mut host.agent {
                ensure!(agent.is_running(), "agent {name} has ended by itself");
            }
        }
        Ok(())
    }
}

/// From its return on, every commit waits for an agent.
async fn make_synchronous(server: &Cluster) -> Result<()> {
    server.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{SYNCHRONOUS}'")).await?;
    server.sql("SELECT pg_reload_conf()").await?;
    let deadline = Instant::now() + PATIENCE;
    while server.value("SHOW synchronous_standby_names").await? != SYNCHRONOUS {
        ensure!(Instant::now() < deadline, "the server does not read its configuration");
        tokio::time::sleep(POLL).await;
    }
    // What sessions look at is written by the checkpointer, once it has read the configuration, too.
    server.sql("CHECKPOINT").await
}

fn strike(bucket: &Bucket, blow: Blow) {
    let faults = bucket.faults();
    let add = |fault: Fault, chance: f64| {
        faults.add(fault.probability(chance));
    };
    let put = |action| Fault::on(Operation::Put, action);
    match blow {
        Blow::Down => {
            faults.refuse(true);
            faults.cut();
        }
        Blow::Cut => {
            faults.cut();
            add(Fault::always(Action::Reset), 0.2);
            add(Fault::always(Action::DropBefore), 0.2);
        }
        Blow::Delay => {
            let late = Duration::from_millis(700);
            add(Fault::on(Operation::List, Action::Delay(late)), 1.0);
            add(Fault::always(Action::Delay(Duration::from_millis(150))), 0.7);
        }
        Blow::Throttle => add(Fault::always(Action::ErrorBefore(503)), 0.7),
        Blow::Half => {
            add(put(Action::HalfRequest), 0.5);
            add(Fault::on(Operation::Get, Action::Truncate), 0.3);
            add(Fault::on(Operation::List, Action::Truncate), 0.3);
        }
        Blow::Lie => {
            add(put(Action::ErrorAfterCommit(500)), 0.3);
            add(put(Action::DropAfterCommit), 0.3);
            add(put(Action::ResetAfterCommit), 0.3);
        }
        Blow::Hang => {
            faults.add(put(Action::HangAfterCommit).key("/wal/").times(1));
            faults.add(put(Action::Hang).key("/wal/").times(1));
        }
    }
}
