//! Damage at rest: what is damaged in one location is read from the other; what is damaged in both is refused by name,
//! and never reaches PostgreSQL.

use crate::folder;
use crate::site::{LOCATIONS, PATIENCE, Site, restore, stored};
use anyhow::{Context, Result, ensure};
use backstay_common::id::ObjectId;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Configuration, Deployment, Finished};
use backstay_tests::random::Random;
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What is done to an object.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Missing,
    FlippedBit,
    Truncated,
    Empty,
    /// Another object of its kind stands in its place, whole.
    Swapped,
}

const DAMAGES: [Damage; 5] =
    [Damage::Missing, Damage::FlippedBit, Damage::Truncated, Damage::Empty, Damage::Swapped];

/// Among the frames: a restore doesn't read the page hashes at the end of a pack, and so cannot miss them.
fn middle(bytes: &[u8], random: &mut Random) -> usize {
    bytes.len() / 4 + random.below(bytes.len() as u64 / 2) as usize
}

/// Does it to `name` in a location; `other` is an object of the same kind.
fn damage(root: &Path, name: &str, other: &str, what: Damage, random: &mut Random) -> Result<()> {
    let path = root.join(name);
    let mut bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    match what {
        Damage::Missing => return Ok(std::fs::remove_file(&path)?),
        Damage::FlippedBit => {
            let at = middle(&bytes, random);
            bytes[at] ^= 1 << random.below(8);
        }
        Damage::Truncated => bytes.truncate(middle(&bytes, random)),
        Damage::Empty => bytes.clear(),
        Damage::Swapped => {
            let theirs = std::fs::read(root.join(other))?;
            std::fs::write(root.join(other), &bytes)?;
            bytes = theirs;
        }
    }
    Ok(std::fs::write(&path, bytes)?)
}

/// Two objects of a kind that a restore to the latest moment needs.
struct Needed {
    kind: &'static str,
    name: String,
    other: String,
}

/// One of each kind, from the newest snapshot on.
fn needed(root: &Path, snapshot: &str, random: &mut Random) -> Result<Vec<Needed>> {
    let two =
        |kind: &'static str, names: Vec<String>, name: usize, other: usize| -> Result<Needed> {
            ensure!(names.len() > 1, "{} has too few {kind}: {names:?}", root.display());
            Ok(Needed { kind, name: names[name].clone(), other: names[other].clone() })
        };
    let wal: Vec<String> = folder::named(root, "/wal/")?
        .into_iter()
        .filter(|name| matches!(name.parse(), Ok(ObjectName::Wal { .. })))
        .collect();
    let last = wal.len() - 1;
    let manifests = folder::named(root, "/manifest")?;
    let newest =
        manifests.iter().position(|name| name.contains(snapshot)).context("no manifest")?;
    // Any pack of the newest snapshot: those that came with it.
    let packs = folder::named(root, "/pack/")?;
    let age = |name: &String| std::fs::metadata(root.join(name)).and_then(|m| m.modified());
    let mut by_age: Vec<(std::time::SystemTime, String)> =
        packs.iter().map(|name| Ok((age(name)?, name.clone()))).collect::<Result<_>>()?;
    by_age.sort();
    let packs: Vec<String> = by_age.into_iter().map(|(_, name)| name).collect();
    let newest_pack = packs.len() - 1;
    Ok(vec![
        two("WAL", wal, last, random.below(last as u64) as usize)?,
        two("pack", packs, newest_pack, 0)?,
        two("manifest", manifests, newest, usize::from(newest == 0))?,
    ])
}

/// Two snapshots with several objects of each kind, written and over; the agent and the server are gone.
async fn finished_site<'s>(scene: &'s Scene, major: &Major) -> Result<(Site<'s>, String)> {
    let mut site = Site::start(scene, major).await?;
    site.ledger.wait_for(200, PATIENCE).await?;
    let snapshot = site.snapshot().await?;
    site.ledger.wait_for(300, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.locations_equal().await?;
    site.agent.terminate(PATIENCE).await?;
    site.cluster.kill()?;
    Ok((site, snapshot))
}

/// A deployment that reads copies of the locations, made anew for each case.
struct Copies {
    deployment: Deployment,
    roots: [std::path::PathBuf; 2],
}

impl Copies {
    async fn new(site: &Site<'_>) -> Result<Copies> {
        let roots = LOCATIONS.map(|name| site.scene.path(&format!("damaged-{name}")));
        let configuration = site.configuration.clone().without("near").without("far");
        let configuration: Configuration = configuration
            .key(site.deployment.key())
            .folder("near", &roots[0])?
            .folder("far", &roots[1])?;
        let deployment = Deployment::new(site.scene, "damaged", &configuration).await?;
        Ok(Copies { deployment, roots })
    }

    fn renew(&self, site: &Site<'_>) -> Result<()> {
        for (name, root) in LOCATIONS.iter().zip(&self.roots) {
            folder::copy(&site.location(name), root)?;
        }
        Ok(())
    }

    /// Restores without starting: all that a restore reads is read.
    async fn restore(&self, site: &Site<'_>) -> Result<Finished> {
        let dir = site.scene.path("restored");
        let _ = std::fs::remove_dir_all(&dir);
        restore(&self.deployment, &dir, "latest", &[]).await
    }
}

/// Every kind of damage to every kind of object.
async fn damaged_objects(scene: &Scene, major: Major) -> Result<()> {
    let (site, snapshot) = finished_site(scene, &major).await?;
    let copies = Copies::new(&site).await?;
    let mut random = scene.random().fork("damage");
    let objects = needed(&site.location("near"), &snapshot, &mut random)?;
    for object in &objects {
        for what in DAMAGES {
            let case = format!("{what:?} {} {}", object.kind, object.name);
            copies.renew(&site)?;
            for (n, root) in copies.roots.iter().enumerate() {
                damage(root, &object.name, &object.other, what, &mut random)
                    .context(case.clone())?;
                let finished = copies.restore(&site).await?;
                if n == 0 {
                    finished.success().with_context(|| format!("{case}, in one location"))?;
                } else {
                    refused(finished, object, what)
                        .with_context(|| format!("{case}, in both locations"))?;
                    if object.kind == "manifest" {
                        let to = format!("snapshot:{snapshot}");
                        let plan = copies.deployment.backstay(&["plan", "--to", &to]).await?;
                        let code = if matches!(what, Damage::Missing) { 3 } else { 4 };
                        plan.expect(code)?.says(&[&snapshot]).context(case.clone())?;
                    }
                }
            }
        }
    }
    // Each location lacks something else: together they have everything, and what comes of it is right.
    copies.renew(&site)?;
    for (object, root) in objects.iter().zip(copies.roots.iter().cycle()) {
        damage(root, &object.name, &object.other, Damage::FlippedBit, &mut random)?;
    }
    copies.restore(&site).await?.success()?;
    let mut restored = Cluster::of(scene, &major, &scene.path("restored"))?;
    restored.start().await?;
    restored.wait_until_writable(PATIENCE).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(damaged_objects);

/// Code 4 with the object's name. A manifest that no location has whole is named too, but an older snapshot serves as well;
/// one that is not there is no snapshot. The last WAL that is not there was never there: `latest` is then earlier.
fn refused(finished: Finished, object: &Needed, what: Damage) -> Result<()> {
    let finished = match (object.kind, what) {
        ("manifest" | "WAL", Damage::Missing) => return finished.success().map(|_| ()),
        // Swapped with the other one, neither is left.
        ("manifest", Damage::FlippedBit | Damage::Truncated | Damage::Empty) => {
            finished.success()?
        }
        _ => finished.expect(4)?,
    };
    // Swapped objects are both wrong: which of them is read first is not told.
    let other = finished.clone().says(&[&object.other]);
    match (what, finished.says(&[&object.name])) {
        (Damage::Swapped, Err(_)) => other.map(|_| ()),
        (_, said) => said.map(|_| ()),
    }
}

/// WAL that is missing in the middle makes everything behind it unreachable, and what lies before stays reachable.
async fn a_hole_in_the_wal(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let session = site.cluster.connect().await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    let early = site.ledger.moment(&session).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.all_stored().await?;
    // Two more spans, whole, so that nothing else covers what will be missing.
    for _ in 0..2 {
        site.cluster
            .sql("CREATE TABLE IF NOT EXISTS filler (m text); INSERT INTO filler SELECT repeat(md5(n::text), 30) FROM generate_series(1, 17000) n")
            .await?;
    }
    site.ledger.wait_for(50, PATIENCE).await?;
    let late = site.ledger.moment(&session).await?;
    site.ledger.wait_for(20, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.locations_equal().await?;
    site.agent.terminate(PATIENCE).await?;
    let near = site.location("near");
    let hole = (early.lsn.get() / (16 << 20) + 1) * (16 << 20);
    let mut removed = 0;
    for name in folder::named(&near, "/wal/")? {
        if let Ok(ObjectName::Wal { range, .. }) = name.parse()
            && range.start.get() <= hole
            && hole < range.end.get()
        {
            for location in LOCATIONS {
                std::fs::remove_file(site.location(location).join(&name))?;
            }
            removed += 1;
        }
    }
    ensure!(removed > 0, "nothing covers {hole:X}");
    let beyond = site.deployment.backstay(&["plan", "--to", &late.rfc3339]).await?;
    ensure!(matches!(beyond.code, Some(3 | 4)), "{beyond:?}");
    beyond.says(&["WAL"])?;
    let (restored, _) = site.restore_and_start("early", &early.rfc3339, &[]).await?;
    site.judge(&restored, &Target::Time(early.micros)).await.map(|_| ())
}
on_drawn_major!(a_hole_in_the_wal);

/// An object that only has the name of a longer one does not cost the pieces that it seems to supersede.
async fn a_planted_name(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.agent.kill()?;
    let near = site.location("near");
    let names = folder::named(&near, "/wal/")?;
    let mut wal = names.iter().filter_map(|name| match name.parse() {
        Ok(ObjectName::Wal { system, branch, range, .. }) => Some((name, system, branch, range)),
        _ => None,
    });
    let (piece, system, branch, range) = wal.next_back().context("no piece")?;
    let range = LsnRange::new(range.start.span_start(), range.start.next_span());
    let id = ObjectId::from_bytes([7; 8]);
    let planted = near.join(ObjectName::Wal { system, branch, range, id }.to_string());
    std::fs::copy(near.join(piece), &planted)?;
    scene.give(&planted)?;
    site.agent.restart().await?;
    let raised = |status: &Value| {
        let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
        alarms.iter().any(|alarm| alarm["name"] == "object-damaged" && alarm["subject"] == "near")
    };
    site.agent.wait_until("an alarm names the location", PATIENCE, raised).await?;
    let listed = |status: &Value| stored(status).is_ok_and(|stored| stored[0] > Lsn::INVALID);
    let status = site.agent.wait_until("the location was listed", PATIENCE, listed).await?;
    ensure!(stored(&status)?[0] < range.end, "the frontier believes the name: {status}");
    ensure!(near.join(piece).exists(), "{piece} is gone");
    std::fs::remove_file(&planted)?;
    site.agent.terminate(PATIENCE).await?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_planted_name);

/// Another key, a damaged key file, one that everybody can read; another cluster's name, another cluster's folder.
async fn wrong_keys_and_clusters(scene: &Scene, major: Major) -> Result<()> {
    let (site, _) = finished_site(scene, &major).await?;
    let dir = scene.path("never");
    let never = async |deployment: &Deployment, code: i32, words: &[&str]| -> Result<()> {
        restore(deployment, &dir, "latest", &[]).await?.expect(code)?.says(words)?;
        ensure!(!dir.exists(), "a refused restore has made {}", dir.display());
        Ok(())
    };
    // A key of the same form that isn't the one.
    let other = Deployment::new(scene, "other", &site.configuration).await?;
    never(&other, 7, &["key", "remedy"]).await.context("another key")?;

    let right = std::fs::read_to_string(site.deployment.key())?;
    let key = scene.path("odd.key");
    let odd =
        Deployment::new(scene, "odd", &site.configuration.clone().key(&write_key(&key, &right)?))
            .await?;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644))?;
    never(&odd, 7, &["odd.key", "chmod 600"]).await.context("a key for everybody")?;
    let last = right.trim_end().chars().last().context("an empty key file")?;
    let flipped = if last == '0' { "1" } else { "0" };
    let mistyped = right.trim_end().strip_suffix(last).context("a key")?.to_owned() + flipped;
    write_key(&key, &mistyped)?;
    never(&odd, 7, &["odd.key"]).await.context("a mistyped key")?;
    write_key(&key, "not a key at all")?;
    never(&odd, 7, &["odd.key"]).await.context("no key")?;
    std::fs::remove_file(&key)?;
    never(&odd, 7, &["odd.key"]).await.context("a key that is not there")?;

    // The right key and another cluster's name.
    let mut toml = std::fs::read_to_string(site.deployment.config())?;
    let name =
        Deployment::new(scene, "name", &site.configuration.clone().key(site.deployment.key()))
            .await?;
    toml = toml.replace("cluster = \"orders\"", "cluster = \"invoices\"");
    std::fs::write(name.config(), toml)?;
    never(&name, 2, &["invoices", "orders"]).await.context("another cluster's name")?;

    // The locations of two clusters, one each: neither is taken for the other.
    let cluster = Cluster::build(scene, &major).name("two").start().await?;
    let mixed = Configuration::default()
        .server(&cluster)
        .key(site.deployment.key())
        .folder("near", &site.location("near"))?
        .folder("far", &scene.path("second"))?;
    let mixed = Deployment::new(scene, "mixed", &mixed).await?;
    mixed.agent_command(&["init"]).await?.expect(2)?.says(&["near", "system", "remedy"])?;
    Ok(())
}
on_drawn_major!(wrong_keys_and_clusters);

fn write_key(path: &Path, text: &str) -> Result<std::path::PathBuf> {
    std::fs::write(path, text)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(path.to_owned())
}
