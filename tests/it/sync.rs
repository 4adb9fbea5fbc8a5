//! Locations that differ: `sync --check` names what, `sync` makes them equal, and what prune let go of stays away.

use crate::folder;
use crate::s3;
use crate::site::{LOCATIONS, PATIENCE, Site, configuration};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::SPAN_BYTES;
use backstay_common::name::ObjectName;
use backstay_common::snapshot::manifest::read_plain;
use backstay_tests::bucket::{Action, Bucket, Fault, Operation};
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::Configuration;
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Two locations, into which one can reach from outside.
enum Places {
    Folders([PathBuf; 2]),
    Buckets(Vec<Bucket>),
}

impl Places {
    fn names(&self, place: usize) -> Result<Vec<String>> {
        let mut names: Vec<String> = match self {
            Places::Folders(roots) => folder::objects(&roots[place])?.into_keys().collect(),
            Places::Buckets(buckets) => {
                s3::objects(&buckets[place], LOCATIONS[place]).into_keys().collect()
            }
        };
        names.sort();
        Ok(names)
    }

    fn read(&self, place: usize, name: &str) -> Result<Vec<u8>> {
        match self {
            Places::Folders(roots) => Ok(std::fs::read(roots[place].join(name))?),
            Places::Buckets(buckets) => {
                let bytes = s3::objects(&buckets[place], LOCATIONS[place]).remove(name);
                Ok(bytes.context("it is not there")?.to_vec())
            }
        }
    }

    fn remove(&self, place: usize, name: &str) -> Result<()> {
        match self {
            Places::Folders(roots) => Ok(std::fs::remove_file(roots[place].join(name))?),
            Places::Buckets(buckets) => {
                ensure!(buckets[place].remove(&format!("{}/{name}", LOCATIONS[place])));
                Ok(())
            }
        }
    }

    fn write(&self, scene: &Scene, place: usize, name: &str, bytes: &[u8]) -> Result<()> {
        match self {
            Places::Folders(roots) => {
                let path = roots[place].join(name);
                let folders = path.ancestors().skip(1).take_while(|folder| !folder.exists());
                for folder in folders.collect::<Vec<_>>().into_iter().rev() {
                    std::fs::create_dir(folder)?;
                    scene.give(folder)?;
                }
                std::fs::write(&path, bytes)?;
                scene.give(&path)?;
            }
            Places::Buckets(buckets) => {
                let key = format!("{}/{name}", LOCATIONS[place]);
                buckets[place].replace(&key, bytes.to_vec());
            }
        }
        Ok(())
    }

    fn flip(&self, scene: &Scene, place: usize, name: &str) -> Result<()> {
        let mut bytes = self.read(place, name)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        self.write(scene, place, name, &bytes)
    }

    fn has(&self, place: usize, name: &str) -> Result<bool> {
        Ok(self.names(place)?.iter().any(|there| there == name))
    }
}

async fn folders<'s>(scene: &'s Scene, major: &Major, more: &str) -> Result<(Site<'s>, Places)> {
    let cluster = Cluster::build(scene, major).start().await?;
    let configuration = configuration(scene, &cluster)?.extra(more);
    let site = Site::of(scene, cluster, configuration).await?;
    let roots = LOCATIONS.map(|name| site.location(name));
    Ok((site, Places::Folders(roots)))
}

/// A second snapshot, and a server that rests.
async fn at_rest(site: &mut Site<'_>) -> Result<String> {
    site.ledger.wait_for(100, PATIENCE).await?;
    let snapshot = site.snapshot().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    Ok(snapshot)
}

async fn sync(site: &Site<'_>, args: &[&str], code: i32) -> Result<Value> {
    let args: Vec<&str> = ["sync", "--json"].iter().chain(args).copied().collect();
    site.deployment.agent_command(&args).await?.expect(code)?.json()
}

/// What a report says that a location has so.
fn told(report: &Value, place: usize, what: &str) -> Result<BTreeSet<String>> {
    let locations = report["locations"].as_array().context("locations")?;
    let here = locations.iter().find(|location| location["location"] == LOCATIONS[place]);
    let differences = here.context("the location")?["differences"].as_array().context("list")?;
    let named = differences.iter().filter(|difference| difference["what"] == what);
    Ok(named.filter_map(|difference| Some(difference["name"].as_str()?.to_owned())).collect())
}

fn amount(report: &Value, place: usize, what: &str) -> u64 {
    report["locations"][place][what]["objects"].as_u64().unwrap_or(u64::MAX)
}

/// The packs that manifests other than `but` name.
fn named_by_others(places: &Places, but: &str) -> Result<BTreeSet<String>> {
    let mut named = BTreeSet::new();
    let others = places.names(0)?.into_iter().filter(|name| name.ends_with("/manifest"));
    for other in others.filter(|name| name != but) {
        let name: ObjectName = other.parse()?;
        let (_, plain) = read_plain(&places.read(0, &other)?.into(), &name)?;
        named.extend(plain.packs.iter().map(|pack| pack.name(plain.system).to_string()));
    }
    Ok(named)
}

/// A whole span, the newest piece, a pack that only this snapshot needs, and its manifest.
fn chosen(places: &Places, snapshot: &str) -> Result<Vec<String>> {
    let names = places.names(0)?;
    let wal = |is_span: bool| {
        let fits = |name: &&String| match name.parse() {
            Ok(ObjectName::Wal { range, .. }) => is_span == (range.len() == SPAN_BYTES),
            _ => false,
        };
        names.iter().rfind(fits).cloned().context("WAL")
    };
    let manifest = names.iter().find(|name| name.contains(&format!("{snapshot}/manifest")));
    let manifest = manifest.context("the manifest")?.clone();
    let name: ObjectName = manifest.parse()?;
    let (_, plain) = read_plain(&places.read(0, &manifest)?.into(), &name)?;
    let shared = named_by_others(places, &manifest)?;
    let mut packs = plain.packs.iter().map(|pack| pack.name(plain.system).to_string());
    let pack = packs.find(|pack| !shared.contains(pack)).context("a pack of its own")?;
    Ok(vec![wal(true)?, wal(false)?, pack, manifest])
}

/// Whatever is missing at one location, or is damaged there, is named, and comes back from the other.
async fn made_equal(site: &mut Site<'_>, places: &Places, snapshot: &str) -> Result<()> {
    let scene = site.scene;
    sync(site, &["--check"], 0).await?;
    let names = chosen(places, snapshot)?;
    let all: BTreeSet<String> = names.iter().cloned().collect();
    for name in &names {
        places.remove(1, name)?;
    }
    let report = sync(site, &["--check"], 4).await?;
    ensure!(told(&report, 1, "missing")? == all, "{report}");
    ensure!(told(&report, 0, "missing")?.is_empty(), "{report}");
    ensure!(!places.has(1, &names[0])?, "a check has changed something");
    let report = sync(site, &[], 0).await?;
    ensure!(amount(&report, 1, "copied") == all.len() as u64, "{report}");
    ensure!(amount(&report, 0, "copied") == 0, "{report}");
    sync(site, &["--check"], 0).await?;

    // A listing does not show a bit; who reads everything finds it.
    let damaged: BTreeSet<String> = names.iter().filter(|n| **n != names[1]).cloned().collect();
    for name in &damaged {
        places.flip(scene, 0, name)?;
    }
    sync(site, &["--check"], 0).await?;
    let report = sync(site, &["--check", "--deep"], 4).await?;
    ensure!(told(&report, 0, "damaged")? == damaged, "{report}");
    ensure!(told(&report, 1, "damaged")?.is_empty(), "{report}");
    let report = sync(site, &["--deep"], 0).await?;
    ensure!(amount(&report, 0, "repaired") == damaged.len() as u64, "{report}");
    sync(site, &["--check", "--deep"], 0).await?;

    // A size it does show, and which of the two is right is found out.
    let whole = places.read(1, &names[2])?;
    places.write(scene, 1, &names[2], &whole[..whole.len() - 1])?;
    let report = sync(site, &["--check"], 4).await?;
    ensure!(told(&report, 1, "damaged")? == [names[2].clone()].into(), "{report}");
    ensure!(told(&report, 0, "damaged")?.is_empty(), "{report}");
    let report = sync(site, &[], 0).await?;
    ensure!(amount(&report, 1, "repaired") == 1, "{report}");
    sync(site, &["--check", "--deep"], 0).await?;
    for name in &names {
        ensure!(places.read(0, name)? == places.read(1, name)?, "{name} has two contents");
    }
    site.told("copied", LOCATIONS[1]).await?;
    for name in &damaged {
        site.told("replaced", name).await?;
    }
    let status = site.agent.status().await?;
    ensure!(status["alarms"].as_array().is_some_and(Vec::is_empty), "{status}");
    Ok(())
}

async fn folders_are_made_equal(scene: &Scene, major: Major) -> Result<()> {
    let (mut site, places) = folders(scene, &major, "").await?;
    let snapshot = at_rest(&mut site).await?;
    made_equal(&mut site, &places, &snapshot).await?;
    let text = site.deployment.agent_command(&["sync", "--check"]).await?.success()?;
    text.says(&["near", "far", "all locations hold the same"])?;
    site.agent.terminate(PATIENCE).await?;
    std::fs::rename(site.location("near"), scene.path("away"))?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(folders_are_made_equal);

async fn buckets_are_made_equal(scene: &Scene, major: Major) -> Result<()> {
    let buckets = vec![Bucket::start().await, Bucket::start().await];
    let cluster = Cluster::build(scene, &major).start().await?;
    let mut configuration = Configuration::default().server(&cluster);
    for (bucket, name) in buckets.iter().zip(LOCATIONS) {
        configuration = s3::with_bucket(configuration, bucket, name);
    }
    let mut site = Site::of(scene, cluster, configuration).await?;
    let snapshot = at_rest(&mut site).await?;
    let places = Places::Buckets(buckets);
    made_equal(&mut site, &places, &snapshot).await?;

    // A location that is down is compared with nothing, and that is told.
    let Places::Buckets(buckets) = &places else { unreachable!() };
    buckets[1].faults().refuse(true);
    for args in [&["--check"][..], &[]] {
        let report = sync(&site, args, 5).await?;
        ensure!(report["failed"][0]["location"] == LOCATIONS[1], "{report}");
    }
    Ok(())
}
on_drawn_major!(buckets_are_made_equal);

/// A location that is added to the config is filled while the agent works: a snapshot does not wait for that, and goes to the others
/// meanwhile.
async fn a_new_location_delays_no_snapshot(scene: &Scene, major: Major) -> Result<()> {
    let (one, two) = (Bucket::start().await, Bucket::start().await);
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = Configuration::default().server(&cluster);
    let configuration = s3::with_bucket(configuration, &one, "one");
    let mut site = Site::of(scene, cluster, configuration).await?;
    for _ in 0..2 {
        site.ledger.wait_for(20, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    let snapshot = at_rest(&mut site).await?;
    site.agent.terminate(PATIENCE).await?;
    let configuration = s3::with_bucket(site.configuration.clone(), &two, "two");
    site.deployment.configure(&configuration.key(site.deployment.key()))?;
    site.deployment.agent_command(&["init"]).await?.success()?;
    // Older than the snapshot, so that nothing but the filling wants it.
    let is_span = |name: &String| {
        let name = name.parse();
        matches!(name, Ok(ObjectName::Wal { range, .. }) if range.len() == SPAN_BYTES)
    };
    let span = s3::objects(&one, "one").into_keys().rfind(is_span).context("a span")?;
    let hangs = two.faults().add(Fault::on(Operation::Put, Action::Hang).key(span.as_str()));
    site.agent.restart().await?;
    let deadline = Instant::now() + PATIENCE;
    while two.faults().fired(hangs) == 0 {
        ensure!(Instant::now() < deadline, "nothing is copied to the new location");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let alarms = site.agent.status().await?["alarms"].to_string();
    ensure!(alarms.contains("nothing can be restored from it alone"), "{alarms}");
    let asked = Instant::now();
    let outcome = site.deployment.agent_command(&["snapshot", "--json"]).await?.success()?;
    // A request that hangs is given up after a minute, and made again three times.
    ensure!(asked.elapsed() < Duration::from_secs(60), "the snapshot took {:?}", asked.elapsed());
    ensure!(outcome.json()?["id"] != snapshot.as_str(), "{outcome:?}");
    two.faults().remove(hangs);
    for args in [&[][..], &["--check"]] {
        sync(&site, args, 0).await?;
    }
    ensure!(s3::objects(&two, "two").contains_key(&span), "{span} was not copied");
    let alarms = site.agent.status().await?["alarms"].to_string();
    ensure!(!alarms.contains("snapshot-pending"), "{alarms}");
    one.faults().refuse(true);
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_new_location_delays_no_snapshot);

/// A pack that is whole nowhere keeps back the manifest that needs it, and nothing else.
async fn one_bad_object_does_not_stop_the_others(scene: &Scene, major: Major) -> Result<()> {
    let (mut site, places) = folders(scene, &major, "").await?;
    let first = site.first_snapshot().await?;
    let snapshot = at_rest(&mut site).await?;
    let names = chosen(&places, &snapshot)?;
    let (pack, manifest) = (&names[2], &names[3]);
    let older = manifest.replace(&snapshot, &first);
    for name in names.iter().chain([&older]) {
        places.remove(1, name)?;
    }
    let whole = places.read(0, pack)?;
    places.flip(scene, 0, pack)?;
    let report = sync(&site, &[], 4).await?;
    ensure!(told(&report, 1, "missing")?.contains(manifest), "{report}");
    ensure!(told(&report, 0, "damaged")? == [pack.clone()].into(), "{report}");
    for name in [&names[0], &names[1], &older] {
        ensure!(places.has(1, name)?, "{name} was not copied: {report}");
    }
    for name in [pack, manifest] {
        ensure!(!places.has(1, name)?, "{name} was copied: {report}");
    }
    let alarms = site.agent.status().await?["alarms"].to_string();
    ensure!(alarms.contains("object-damaged") && alarms.contains("sync-failed"), "{alarms}");

    // Put right by hand, it goes on.
    places.write(scene, 0, pack, &whole)?;
    let report = sync(&site, &[], 0).await?;
    ensure!(places.has(1, manifest)? && places.has(1, pack)?, "{report}");
    sync(&site, &["--check", "--deep"], 0).await?;
    let status = site.agent.status().await?;
    ensure!(status["alarms"].as_array().is_some_and(Vec::is_empty), "{status}");
    Ok(())
}
on_drawn_major!(one_bad_object_does_not_stop_the_others);

/// What prune has let go of does not come back from a location that has it again, nor does a piece whose span is there.
async fn what_is_not_needed_stays_away(scene: &Scene, major: Major) -> Result<()> {
    let trial = "[retention]\nwindow = \"10s\"\ngrace = \"2s\"\n";
    let (mut site, places) = folders(scene, &major, trial).await?;
    let first = site.first_snapshot().await?;
    site.all_stored().await?;
    site.locations_equal().await?;
    let kept = scene.path("kept");
    folder::copy(&site.location("near"), &kept)?;
    at_rest(&mut site).await?;
    tokio::time::sleep(Duration::from_secs(23)).await;
    site.snapshot().await?;
    let manifest = |name: &String| name.contains(&format!("{first}/manifest"));
    let deadline = Instant::now() + PATIENCE;
    while places.names(0)?.iter().chain(&places.names(1)?).any(manifest) {
        ensure!(Instant::now() < deadline, "prune leaves {first}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let there: BTreeSet<String> =
        [places.names(0)?, places.names(1)?].concat().into_iter().collect();
    let gone: Vec<String> = folder::objects(&kept)?.into_keys().collect();
    let gone: Vec<String> = gone.into_iter().filter(|name| !there.contains(name)).collect();
    ensure!(gone.iter().any(manifest) && gone.iter().any(|n| n.contains("/wal/")), "{gone:?}");
    for name in &gone {
        places.write(scene, 0, name, &std::fs::read(kept.join(name))?)?;
        // As a location has it that was away while prune ran.
        let stored = std::fs::metadata(kept.join(name))?.modified()?;
        std::fs::File::open(site.location("near").join(name))?.set_modified(stored)?;
    }
    sync(&site, &["--check"], 0).await?;
    let report = sync(&site, &[], 0).await?;
    ensure!(amount(&report, 1, "copied") == 0, "{report}");
    let far = places.names(1)?;
    ensure!(!gone.iter().any(|name| far.contains(name)), "something came back: {report}");
    Ok(())
}
on_drawn_major!(what_is_not_needed_stays_away);
