use crate::plan::{Plan, StopPoint};
use crate::testing::{MIB, Repo, Writer, at, micros, segment_size};
use backstay_common::Kind;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::pgtime::PgTime;
use backstay_common::wal::testing::WalBuilder;

/// Minutes after noon at which transactions end: 1, 2, 3; with a snapshot before them. Two objects.
struct Day {
    repo: Repo,
    writer: Writer,
    commits: Vec<Lsn>,
    stop: Lsn,
}

async fn day(places: &[usize]) -> Day {
    let repo = Repo::new(places.len().max(1) as u8).await;
    let mut writer = repo.first_branch(places).await;
    writer.wal.ordinary(4, 5000);
    writer.wal.commit(9, micros(-60));
    writer.snapshot(&repo, 0).await;
    let stop = writer.position();
    let mut commits = vec![writer.wal.commit(10, micros(60)), writer.wal.commit(11, micros(120))];
    writer.wal.ordinary(12, 20_000);
    writer.ship_until(&repo, writer.position().align_down(8192), None).await;
    writer.wal.restore_point("release", micros(130));
    writer.wal.parameter_change(250, 1);
    commits.push(writer.wal.commit(12, micros(180)));
    writer.wal.ordinary(13, 300);
    writer.ship(&repo).await;
    Day { repo, writer, commits, stop }
}

fn end_of(wal: &WalBuilder, start: Lsn) -> Lsn {
    wal.records().iter().find(|record| record.start == start).unwrap().end
}

fn stops_before(plan: &Plan, wal: &WalBuilder, record: Lsn) {
    assert_eq!(plan.stop, StopPoint::BeforeRecord(record), "{plan}");
    assert_eq!(plan.end, end_of(wal, record), "the record that stops the replay is there");
    assert_eq!(plan.legs.last().unwrap().end, plan.end);
}

fn stops_after(plan: &Plan, wal: &WalBuilder, record: Lsn) {
    assert_eq!(plan.stop, StopPoint::AfterRecord(record), "{plan}");
    assert_eq!(plan.end, end_of(wal, record));
}

#[tokio::test]
async fn a_time_means_before_the_first_later_transaction() {
    let day = day(&[0]).await;
    let wal = &day.writer.wal;
    let plan = day.repo.plan("2026-11-22 12:01:30Z").await.unwrap();
    stops_before(&plan, wal, day.commits[1]);
    assert_eq!(plan.last_transaction, Some(PgTime(micros(60))));
    assert_eq!(plan.first_lost, Some(PgTime(micros(120))));
    assert_eq!(plan.legs[0].start, Lsn::new(3 * MIB), "from the start of the snapshot's segment");
    assert_eq!((plan.database_bytes, plan.estimate_seconds), (400_000_000, 2 + 1 + 3));
    let plan = day.repo.plan("2026-11-22 12:02:00Z").await.unwrap();
    stops_before(&plan, wal, day.commits[2]);
    assert_eq!(plan.last_transaction, Some(PgTime(micros(120))), "a commit at the very time is in");
    let plan = day.repo.plan("2026-11-22 12:00:30Z").await.unwrap();
    stops_before(&plan, wal, day.commits[0]);
    assert_eq!(plan.minimums.max_connections, 0, "the parameter change is later");
}

#[tokio::test]
async fn positions_transactions_names_and_the_end() {
    let day = day(&[0]).await;
    let (repo, wal) = (&day.repo, &day.writer.wal);
    let last = wal.records().last().unwrap();
    let plan = repo.plan("latest").await.unwrap();
    stops_after(&plan, wal, last.start);
    assert_eq!(plan.last_transaction, Some(PgTime(micros(180))));
    assert_eq!((plan.first_lost, plan.minimums.max_connections), (None, 250));
    let inside = day.commits[1].add(8);
    let plan = repo.plan(&format!("lsn:{inside}")).await.unwrap();
    stops_after(&plan, wal, day.commits[0]);
    assert_eq!(plan.first_lost, Some(PgTime(micros(120))));
    let plan = repo.plan(&format!("lsn:{}", last.end)).await.unwrap();
    stops_after(&plan, wal, last.start);
    stops_after(&repo.plan("xid:11").await.unwrap(), wal, day.commits[1]);
    let plan = repo.plan("name:release").await.unwrap();
    assert_eq!(plan.last_transaction, Some(PgTime(micros(120))));
    assert_eq!(plan.first_lost, Some(PgTime(micros(180))));
    assert!(
        matches!(plan.stop, StopPoint::AfterRecord(at) if at > day.commits[1] && at < day.commits[2])
    );
    let plan = repo.plan("snapshot:20261122").await.unwrap();
    assert_eq!((plan.stop, plan.end), (StopPoint::Consistent, day.stop));
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap().end, day.stop);
    assert!(plan.to_string().contains("as soon as the snapshot is consistent"), "{plan}");
}

#[tokio::test]
async fn what_is_not_there_is_refused_with_the_nearest_that_is() {
    let day = day(&[0]).await;
    let repo = &day.repo;
    let late = repo.refusal("2026-11-22 12:10:00Z").await;
    assert!(late.contains("2026-11-22T12:03:00Z") && late.contains("latest"), "{late}");
    let early = repo.refusal("2026-11-22 11:30:00Z").await;
    assert!(early.contains(&format!("lsn:{}", day.stop)), "{early}");
    let future = repo.refusal("2027-11-22 12:10:00Z").await;
    assert!(future.contains("future"), "{future}");
    let beyond = repo.refusal("lsn:7F/0").await;
    assert!(beyond.contains(&day.writer.position().to_string()), "{beyond}");
    assert!(repo.refusal("lsn:0/300028").await.contains("earliest"), "before the snapshot's end");
    assert!(repo.refusal("xid:777").await.contains("no such record"));
    assert!(
        repo.refusal("xid:9").await.contains("no such record"),
        "it ended before the snapshot began"
    );
    assert!(repo.refusal("name:nothing").await.contains("no such record"));
    assert!(repo.refusal("snapshot:1999").await.contains("20261122T120000Z"));
}

#[tokio::test]
async fn an_idle_server_is_covered_by_its_clock() {
    let mut day = day(&[0]).await;
    let last = day.writer.wal.ordinary(14, 100);
    day.writer.ship_with_clock(&day.repo, 600).await;
    let plan = day.repo.plan("2026-11-22 12:09:58Z").await.unwrap();
    stops_after(&plan, &day.writer.wal, last);
    day.repo.refusal("2026-11-22 12:09:59.5Z").await;
    day.repo.head(day.writer.branch, day.writer.position(), 900, &[0]).await;
    let plan = day.repo.plan("2026-11-22 12:14:59Z").await.unwrap();
    stops_after(&plan, &day.writer.wal, last);
    // What this head says is true of WAL that is stored nowhere.
    day.repo.head(day.writer.branch, day.writer.position().add(8), 5000, &[0]).await;
    day.repo.refusal("2026-11-22 12:20:00Z").await;
}

#[tokio::test]
async fn a_gap_is_named_with_what_can_be_reached_around_it() {
    let mut day = day(&[0]).await;
    let before = day.writer.position();
    day.writer.wal.commit(20, micros(240));
    let lost = day.writer.seal(&day.repo, day.writer.position(), None);
    let after = day.writer.position();
    day.writer.wal.commit(21, micros(300));
    day.writer.ship(&day.repo).await;
    let said = day.repo.refusal("2026-11-22 12:04:30Z").await;
    assert!(said.contains(&LsnRange::new(before, after).to_string()), "{said}");
    assert!(said.contains(&format!("lsn:{before}")), "{said}");
    let plan = day.repo.plan("latest").await.unwrap();
    assert_eq!(plan.end, before);
    assert!(plan.notes.iter().any(|note| note.contains(&after.to_string())), "{plan}");
    // Its segment begins before the gap, so this one cannot be used.
    let unusable = day.writer.snapshot(&day.repo, 380).await;
    day.writer.wal.switch(true);
    let second = day.writer.snapshot(&day.repo, 400).await;
    day.writer.ship(&day.repo).await;
    assert!(!day.repo.refusal("2026-11-22 12:04:30Z").await.contains(&unusable.to_string()));
    assert!(day.repo.refusal("xid:20").await.contains(&second.to_string()));
    day.repo.put(&lost, &[0]).await;
    day.repo.plan("2026-11-22 12:04:30Z").await.unwrap();
}

#[tokio::test]
async fn two_half_broken_locations_make_a_whole_one() {
    let mut day = day(&[0, 1]).await;
    let only_a = {
        day.writer.wal.commit(30, micros(200));
        day.writer.places = vec![0];
        day.writer.ship(&day.repo).await
    };
    day.writer.wal.commit(31, micros(210));
    day.writer.places = vec![1];
    day.writer.ship(&day.repo).await;
    let last = day.writer.wal.commit(32, micros(220));
    day.writer.places = vec![0, 1];
    let both = day.writer.ship(&day.repo).await;
    day.repo.damage(0, &both);
    stops_after(&day.repo.plan("latest").await.unwrap(), &day.writer.wal, last);
    std::fs::remove_file(day.repo.path(0, &both)).unwrap();
    stops_after(&day.repo.plan("xid:32").await.unwrap(), &day.writer.wal, last);
    day.repo.damage(0, &only_a);
    let error = day.repo.plan("latest").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.message().contains(&only_a.to_string()), "{error}");
}

#[tokio::test]
async fn a_damaged_span_is_passed_over_for_its_pieces() {
    let mut day = day(&[0]).await;
    let from = day.writer.position();
    day.writer.wal.commit(30, micros(200));
    let whole = day.writer.seal(&day.repo, day.writer.position(), None);
    let last = day.writer.wal.commit(31, micros(210));
    day.writer.ship(&day.repo).await;
    day.repo.put(&whole, &[0]).await;
    day.repo.damage(0, &whole.name);
    let error = day.repo.plan("latest").await.unwrap_err();
    assert!(error.message().contains(&whole.name.to_string()), "{error}");
    // The same WAL again, as an agent after a restart ships it, together with what follows.
    let mut again = day.repo.first_branch(&[]).await;
    again.wal = day.writer.wal.clone();
    again.seal(&day.repo, from, None);
    again.places = vec![0];
    again.ship_until(&day.repo, end_of(&day.writer.wal, last), None).await;
    stops_after(&day.repo.plan("latest").await.unwrap(), &day.writer.wal, last);
}

#[tokio::test]
async fn large_objects_are_read_by_their_ends_and_records_may_straddle_them() {
    let mut day = day(&[0]).await;
    let mut state = 1u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let noise: Vec<u8> = (0..700_000).map(|_| random()).collect();
    day.writer.wal.record(10, 0, 40, &noise);
    let commit = day.writer.wal.commit(40, micros(200));
    // Cut inside the commit record.
    let name = day.writer.ship_until(&day.repo, commit.add(16), None).await;
    assert!(std::fs::metadata(day.repo.path(0, &name)).unwrap().len() > 300_000);
    day.writer.wal.record(10, 0, 41, &noise);
    let last = day.writer.wal.commit(41, micros(220));
    day.writer.ship(&day.repo).await;
    stops_before(&day.repo.plan("2026-11-22 12:03:10Z").await.unwrap(), &day.writer.wal, commit);
    stops_after(&day.repo.plan("xid:40").await.unwrap(), &day.writer.wal, commit);
    stops_after(&day.repo.plan("latest").await.unwrap(), &day.writer.wal, last);
}

#[tokio::test]
async fn a_promotion_is_followed() {
    let mut day = day(&[0]).await;
    let mut second = day.repo.promote(&day.writer, 2, 0xb).await;
    let switch = day.writer.position();
    // The old server went on for a moment, and its agent with it.
    let lost = day.writer.wal.commit(50, micros(230));
    let lost_last = day.writer.wal.commit(51, micros(240));
    day.writer.ship(&day.repo).await;
    let commit = second.wal.commit(60, micros(300));
    let last = second.wal.commit(61, micros(360));
    second.ship(&day.repo).await;
    let plan = day.repo.plan("2026-11-22 12:05:30Z").await.unwrap();
    stops_before(&plan, &second.wal, last);
    let legs: Vec<(u32, Lsn, Lsn)> =
        plan.legs.iter().map(|l| (l.timeline().get(), l.start, l.end)).collect();
    let segment = segment_size().start_of(switch);
    assert_eq!(legs, [(1, Lsn::new(3 * MIB), switch), (2, segment, plan.end)]);
    assert_eq!(plan.histories.len(), 1);
    stops_after(&day.repo.plan("latest").await.unwrap(), &second.wal, last);
    let plan = day.repo.plan("2026-11-22 12:03:55Z").await.unwrap();
    stops_before(&plan, &second.wal, commit);
    assert!(plan.notes.iter().any(|note| note.contains("00000001-0000000a")), "{plan}");
    let plan =
        day.repo.plan_with("latest", |r| r.timeline = Some("1".parse().unwrap())).await.unwrap();
    stops_after(&plan, &day.writer.wal, lost_last);
    let plan = day.repo.plan("xid:50").await.unwrap();
    stops_after(&plan, &day.writer.wal, lost);
    assert_eq!(plan.legs.len(), 1);
    let plan = day.repo.plan("2026-11-22 12:01:30Z").await.unwrap();
    stops_before(&plan, &day.writer.wal, day.commits[1]);
    assert_eq!(plan.legs.len(), 1, "it stops before the switch");
    // A snapshot taken on the new timeline is the one to use from then on.
    let newer = second.snapshot(&day.repo, 400).await;
    second.ship(&day.repo).await;
    let plan = day.repo.plan("latest").await.unwrap();
    assert_eq!((plan.snapshot, plan.legs.len()), (newer, 1));
}

#[tokio::test]
async fn two_servers_on_one_timeline_want_a_choice() {
    let day = day(&[0]).await;
    let mut one = day.repo.promote(&day.writer, 2, 0xb).await;
    let mut two = day.repo.promote(&day.writer, 2, 0xc).await;
    let in_one = one.wal.commit(60, micros(300));
    one.ship(&day.repo).await;
    two.wal.ordinary(7, 999);
    let in_two = two.wal.commit(60, micros(310));
    two.ship(&day.repo).await;
    for target in ["latest", "xid:60", "2026-11-22 12:04:00Z"] {
        let said = day.repo.refusal(target).await;
        assert!(said.contains("00000002-0000000b") && said.contains("00000002-0000000c"), "{said}");
    }
    for (branch, wal, commit) in
        [("00000002-0000000b", &one.wal, in_one), ("00000002-0000000c", &two.wal, in_two)]
    {
        let choose = |r: &mut super::PlanRequest| r.timeline = Some(branch.parse().unwrap());
        stops_after(&day.repo.plan_with("latest", choose).await.unwrap(), wal, commit);
    }
    let plan = day.repo.plan("2026-11-22 12:01:30Z").await.unwrap();
    stops_before(&plan, &day.writer.wal, day.commits[1]);
}

#[tokio::test]
async fn an_old_server_that_lives_on_is_not_silently_left_behind() {
    let mut day = day(&[0]).await;
    let mut rogue = day.repo.promote(&day.writer, 2, 0xb).await;
    rogue.wal.commit(60, micros(300));
    rogue.ship(&day.repo).await;
    day.writer.wal.commit(70, micros(5000));
    day.writer.ship(&day.repo).await;
    let said = day.repo.refusal("latest").await;
    assert!(said.contains("--timeline 2") && said.contains("--timeline 1"), "{said}");
}

#[tokio::test]
async fn a_clock_set_back_is_shown_and_neither_answer_taken() {
    let mut day = day(&[0]).await;
    let early = day.writer.wal.commit(30, micros(3600));
    // The clock is set back by an hour, and a snapshot is taken.
    let second = day.writer.snapshot(&day.repo, 300).await;
    day.writer.wal.commit(31, micros(320));
    let late = day.writer.wal.commit(32, micros(3700));
    day.writer.ship(&day.repo).await;
    let said = day.repo.refusal("2026-11-22 12:30:00Z").await;
    assert!(said.contains(&early.to_string()) && said.contains(&late.to_string()), "{said}");
    let plan =
        day.repo.plan_with("2026-11-22 12:30:00Z", |r| r.snapshot = Some(second.to_string())).await;
    stops_before(&plan.unwrap(), &day.writer.wal, late);
    let plan = day.repo.plan("2026-11-22 12:01:30Z").await.unwrap();
    stops_before(&plan, &day.writer.wal, day.commits[1]);
}

#[tokio::test]
async fn the_newest_snapshot_before_the_target_is_used() {
    let mut day = day(&[0]).await;
    let second = day.writer.snapshot(&day.repo, 300).await;
    day.writer.wal.restore_point("release", micros(310));
    let commit = day.writer.wal.commit(31, micros(320));
    day.writer.ship(&day.repo).await;
    let plan = day.repo.plan("2026-11-22 12:05:05Z").await.unwrap();
    stops_before(&plan, &day.writer.wal, commit);
    assert_eq!(plan.snapshot, second);
    let first = day.repo.plan("2026-11-22 12:02:30Z").await.unwrap().snapshot;
    assert_eq!(first.began(), at(0));
    let plan = day.repo.plan("name:release").await.unwrap();
    assert_eq!(plan.snapshot, second, "the newest of two restore points of one name");
    let plan =
        day.repo.plan_with("name:release", |r| r.snapshot = Some(first.to_string())).await.unwrap();
    assert!(plan.notes.iter().any(|note| note.contains("another before it")), "{plan}");
}

#[tokio::test]
async fn the_damaged_servers_wal_extends_what_is_stored() {
    let mut day = day(&[0]).await;
    let stored = day.writer.position();
    let last = day.writer.wal.commit(80, micros(500));
    let pg_wal = day.repo.folder.path().join("pg_wal");
    std::fs::create_dir(&pg_wal).unwrap();
    let segment = segment_size().start_of(stored);
    let mut file = day.writer.bytes(LsnRange::new(segment, day.writer.position())).to_vec();
    // Behind the valid WAL lies the old content of a recycled segment.
    file.resize(MIB as usize, 0x5A);
    let name = segment_size().file_name(day.writer.branch.timeline, segment_size().number(segment));
    std::fs::write(pg_wal.join(&name), &file).unwrap();
    assert_eq!(day.repo.plan("latest").await.unwrap().end, stored);
    let with = |r: &mut super::PlanRequest| r.wal_from = Some(pg_wal.clone());
    let plan = day.repo.plan_with("latest", with).await.unwrap();
    stops_after(&plan, &day.writer.wal, last);
    assert_eq!(plan.wal_from.as_ref(), Some(&pg_wal));
    let plan = day.repo.plan_with("2026-11-22 12:01:30Z", with).await.unwrap();
    assert_eq!(plan.wal_from, None, "the end is stored");
    // Another server's file: what is stored is not in it.
    let at = stored.since(segment) as usize - 100;
    file[at] ^= 1;
    std::fs::write(pg_wal.join(&name), &file).unwrap();
    let plan = day.repo.plan_with("latest", with).await.unwrap();
    assert_eq!(plan.end, stored);
}

#[tokio::test]
async fn a_wrong_key_is_said_to_be_one() {
    let mut day = day(&[0]).await;
    let other = std::sync::Arc::new(backstay_common::keys::file::FileProvider::generate());
    let keyring = backstay_common::keys::Keyring::new(other, day.repo.access.cluster.clone());
    day.repo.access.keyring = std::sync::Arc::new(keyring);
    let error = day.repo.plan("latest").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Key, "{error}");
}
