use super::testing::WalBuilder;
use super::*;
use crate::id::SystemId;
use crate::lsn::{Lsn, LsnRange};
use crate::segment::{SegmentSize, TimelineId};
use proptest::prelude::*;

const SYSTEM: SystemId = SystemId::new(7_312_345_678_901_234_567);
const MIB: u64 = 1 << 20;

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn version(major: u32) -> WalVersion {
    WalVersion::from_major(major).unwrap()
}

fn segments(mib: u32) -> SegmentSize {
    SegmentSize::new(mib << 20).unwrap()
}

/// Segments of 1 MiB on timeline 3, from the third segment on.
fn builder(major: u32) -> WalBuilder {
    WalBuilder::new(version(major), segments(1), SYSTEM, timeline(3), Lsn::new(3 * MIB))
}

fn decoder_at(major: u32, start: Lsn) -> Decoder {
    Decoder::new(version(major), segments(1), SYSTEM, timeline(3), start)
}

fn decode(decoder: &mut Decoder, bytes: &[u8]) -> (Vec<Event>, Result<(), DecodeError>) {
    let mut events = Vec::new();
    let result = decoder.feed(bytes, &mut |event| events.push(event));
    (events, result)
}

fn decode_all(major: u32, wal: &WalBuilder) -> Vec<Event> {
    let mut decoder = decoder_at(major, wal.start());
    let (events, result) = decode(&mut decoder, wal.bytes());
    assert_eq!(result, Ok(()));
    assert_eq!(decoder.position(), wal.position());
    events
}

fn kinds(events: Vec<Event>) -> Vec<EventKind> {
    events.into_iter().map(|event| event.kind).collect()
}

/// A step of a generated WAL.
#[derive(Clone, Debug)]
enum Step {
    Ordinary(usize),
    Commit(u32, i64),
    Prepared(bool, u32, i64, u32),
    RestorePoint(String),
    Overwritten(usize),
    Switch(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0usize..400).prop_map(Step::Ordinary),
        4 => (8_000usize..40_000).prop_map(Step::Ordinary),
        6 => (3u32.., 0i64..1 << 60).prop_map(|(xid, time)| Step::Commit(xid, time)),
        2 => (any::<bool>(), 3u32.., 0i64..1 << 60, 0u32..3000)
            .prop_map(|(commits, xid, time, items)| Step::Prepared(commits, xid, time, items)),
        2 => "[a-zé]{1,20}".prop_map(Step::RestorePoint),
        1 => (9_000usize..30_000).prop_map(Step::Overwritten),
        1 => any::<bool>().prop_map(Step::Switch),
    ];
    proptest::collection::vec(step, 1..40)
}

fn build(major: u32, steps: &[Step]) -> WalBuilder {
    let mut wal = builder(major);
    for step in steps {
        match step {
            Step::Ordinary(bytes) => wal.ordinary(9, *bytes),
            Step::Commit(xid, time) => wal.commit(*xid, *time),
            Step::Prepared(commits, xid, time, items) => {
                wal.end_prepared(*commits, *xid, *time, *items, items / 7)
            }
            Step::RestorePoint(name) => wal.restore_point(name, 77),
            Step::Overwritten(bytes) => wal.overwritten(*bytes, 5),
            Step::Switch(headers) => wal.switch(*headers),
        };
    }
    wal
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_cut_of_the_bytes_gives_the_same_events(
        major in 14u32..=18, steps in steps(), cuts in proptest::collection::vec(1usize..9000, 1..50)
    ) {
        let wal = build(major, &steps);
        let whole = decode_all(major, &wal);
        let mut decoder = decoder_at(major, wal.start());
        let mut events = Vec::new();
        let mut rest = wal.bytes();
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*cut));
            decoder.feed(now, &mut |event| events.push(event)).unwrap();
            prop_assert!(decoder.record_end() <= decoder.position());
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(&events, &whole);
        prop_assert_eq!(decoder.last_record(), wal.records().last().map(|r| r.start));
        prop_assert_eq!(decoder.record_end(), wal.position());
    }

    #[test]
    fn decoding_goes_on_wherever_it_was_left(
        major in 14u32..=18, steps in steps(), cuts in proptest::collection::vec(1usize..20_000, 1..50)
    ) {
        let wal = build(major, &steps);
        let (mut decoder, mut events, mut to) = (decoder_at(major, wal.start()), Vec::new(), 0);
        for cut in cuts.iter().cycle() {
            let point = minicbor::to_vec(decoder.resume_point()).unwrap();
            let point: ResumePoint = minicbor::decode(&point).unwrap();
            prop_assert!(point.at <= decoder.position() && point.at == decoder.record_end());
            decoder = Decoder::resume(version(major), segments(1), SYSTEM, timeline(3), point);
            let from = point.at.since(wal.start()) as usize;
            to = wal.bytes().len().min(to + cut);
            let (now, result) = decode(&mut decoder, &wal.bytes()[from..to]);
            prop_assert_eq!(result, Ok(()), "from {}", point.at);
            events.extend(now);
            if to == wal.bytes().len() {
                break;
            }
        }
        prop_assert_eq!(events, decode_all(major, &wal));
        prop_assert_eq!(decoder.record_end(), wal.position());
    }

    #[test]
    fn any_page_is_a_start(major in 14u32..=18, steps in steps()) {
        let wal = build(major, &steps);
        let whole = decode_all(major, &wal);
        for offset in (0..wal.bytes().len()).step_by(PAGE_BYTES as usize) {
            let start = wal.start().add(offset as u64);
            let (events, result) = decode(&mut decoder_at(major, start), &wal.bytes()[offset..]);
            prop_assert_eq!(result, Ok(()), "from {}", start);
            let suffix: Vec<Event> = whole.iter().filter(|e| e.start >= start).cloned().collect();
            prop_assert_eq!(events, suffix, "from {}", start);
        }
    }

    #[test]
    fn any_record_is_a_start(steps in steps()) {
        let wal = build(16, &steps);
        let whole = decode_all(16, &wal);
        for record in wal.records() {
            let offset = record.start.since(wal.start()) as usize;
            let (events, result) = decode(&mut decoder_at(16, record.start), &wal.bytes()[offset..]);
            prop_assert_eq!(result, Ok(()), "from {}", record.start);
            let suffix = whole.iter().filter(|e| e.start >= record.start).count();
            prop_assert_eq!(events.len(), suffix);
        }
    }

    #[test]
    fn any_flipped_bit_is_found(
        bit: u64, sizes in proptest::collection::vec(0usize..300, 30..60), big in 8_000usize..20_000
    ) {
        let mut wal = builder(17);
        sizes.iter().for_each(|&bytes| { wal.ordinary(9, bytes); });
        wal.commit(10, 1);
        wal.ordinary(9, big);
        wal.commit(11, 2);
        let mut bytes = wal.bytes().to_vec();
        let bit = (bit % (bytes.len() as u64 * 8)) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut decoder = decoder_at(17, wal.start());
        let (events, result) = decode(&mut decoder, &bytes);
        let at = wal.start().add(bit as u64 / 8);
        match harmless(&wal, at, bit % 8) {
            true => prop_assert_eq!((events.len(), result), (2, Ok(()))),
            // A longer length waits for bytes that never come; all else is an error.
            false => {
                prop_assert!(result.is_err() || decoder.last_record() != wal.records().last().map(|r| r.start));
                prop_assert!(decoder.record_end() <= at, "{} is proven, {} is bad", decoder.record_end(), at);
            }
        }
    }

    #[test]
    fn noise_is_refused_and_never_panics(noise in proptest::collection::vec(any::<u8>(), 24..20_000)) {
        let (events, _) = decode(&mut decoder_at(15, Lsn::new(MIB)), &noise);
        prop_assert!(events.is_empty());
    }
}

/// True for bits that PostgreSQL does not look at either: padding behind records and in page headers, the hint bit, and
/// the unused remainder length of pages that continue nothing.
fn harmless(wal: &WalBuilder, at: Lsn, bit: usize) -> bool {
    let page = at.align_down(PAGE_BYTES);
    let offset = at.since(page);
    let long = page.get().is_multiple_of(MIB);
    let record = wal.records().iter().find(|r| r.contains(at)).unwrap_or(&wal.records()[0]);
    let continues =
        record.start < page && wal.records().iter().any(|r| r.start < page && page < r.end);
    match offset {
        2 => bit == 2,
        // A lower timeline on the first page is an ancestor's.
        4 if page == wal.start() => bit < 2,
        16..20 => !continues,
        20..24 => true,
        24..40 if long => false,
        0..24 => false,
        _ => {
            let record_bytes_end = record_data_end(wal, record);
            at >= record_bytes_end
        }
    }
}

/// Where a record's bytes end and its padding begins.
fn record_data_end(wal: &WalBuilder, record: &LsnRange) -> Lsn {
    let offset = record.start.since(wal.start()) as usize;
    let total = u32_at(wal.bytes(), offset).unwrap();
    let padding = total.next_multiple_of(8) - total;
    Lsn::new(record.end.get() - u64::from(padding))
}

#[test]
fn every_kind_is_read_in_every_version() {
    for major in 14..=18 {
        let mut wal = builder(major);
        let starts = [
            wal.commit(700, 1_000),
            wal.abort(701, 1_001),
            wal.prepare(702, 1_002),
            wal.end_prepared(true, 702, 1_003, 5, 3),
            wal.end_prepared(false, 703, 1_004, 0, 9),
            wal.restore_point("before the release", 1_005),
            wal.parameter_change(100, 1),
            wal.checkpoint(false, Lsn::new(0x30_0028), false),
            wal.end_of_recovery(1_006, timeline(2)),
            wal.record(0, 0x50, 0, &0x20_0028u64.to_le_bytes()),
            wal.record(0, 0x80, 0, &[0]),
        ];
        let events = decode_all(major, &wal);
        assert_eq!(events.iter().map(|e| e.start).collect::<Vec<_>>(), starts);
        assert!(events.windows(2).all(|pair| pair[1].prev == pair[0].start));
        assert_eq!(events[0].target_xid(), Some(700));
        assert_eq!(events[3].target_xid(), Some(702));
        let wal_level = (major >= 17).then_some(1);
        let expected = [
            EventKind::Commit { time: 1_000 },
            EventKind::Abort { time: 1_001 },
            EventKind::Prepare { time: 1_002, xid: 702 },
            EventKind::CommitPrepared { time: 1_003, xid: 702 },
            EventKind::AbortPrepared { time: 1_004, xid: 703 },
            EventKind::RestorePoint { time: 1_005, name: "before the release".into() },
            EventKind::ParameterChange {
                max_connections: 100,
                max_worker_processes: 100,
                max_wal_senders: 100,
                max_prepared_xacts: 100,
                max_locks_per_xact: 100,
                wal_level: 1,
                wal_log_hints: false,
            },
            EventKind::Checkpoint {
                shutdown: false,
                redo: Lsn::new(0x30_0028),
                timeline: timeline(3),
                prev_timeline: timeline(3),
                full_page_writes: false,
                wal_level,
                next_xid: 0,
                time: 0,
            },
            EventKind::EndOfRecovery {
                time: 1_006,
                timeline: timeline(3),
                prev_timeline: timeline(2),
                wal_level,
            },
            EventKind::BackupEnd { start: Lsn::new(0x20_0028) },
            EventKind::FullPageWrites(false),
        ];
        assert_eq!(kinds(events), expected, "PostgreSQL {major}");
    }
}

#[test]
fn main_data_is_found_behind_block_images() {
    for (major, bimg_info, has_hole_length) in
        [(14, 0x03, true), (14, 0x05, false), (15, 0x03, false), (15, 0x05, true), (18, 0x11, true)]
    {
        let mut body = vec![0, 0x30]; // block 0 with image and data
        body.extend(3u16.to_le_bytes());
        body.extend(100u16.to_le_bytes());
        body.extend(24u16.to_le_bytes());
        body.push(bimg_info);
        if has_hole_length {
            body.extend(4000u16.to_le_bytes());
        }
        body.extend([9; 16]); // relation and block number
        body.extend([1, 0x80 | 0x20, 2, 0, 7, 0, 0, 0]); // block 1, same relation, two bytes of data
        body.extend([253, 1, 0, 252, 44, 0, 0, 0, 255, 8]); // origin, top-level xid, main data
        body.extend([0xEE; 100 + 3 + 2]);
        body.extend(123_456i64.to_le_bytes());
        let mut wal = builder(major);
        wal.record_body(1, 0, 50, &body);
        assert_eq!(kinds(decode_all(major, &wal)), [EventKind::Commit { time: 123_456 }]);
    }
}

#[test]
fn a_partial_record_is_no_error() {
    let mut wal = builder(16);
    wal.commit(10, 1);
    let start = wal.ordinary(11, 30_000);
    wal.commit(12, 2);
    for end in (40..wal.bytes().len()).step_by(97) {
        let mut decoder = decoder_at(16, wal.start());
        let (_, result) = decode(&mut decoder, &wal.bytes()[..end]);
        assert_eq!(result, Ok(()));
        let complete = wal.records().iter().filter(|r| r.end <= decoder.position());
        assert_eq!(
            decoder.record_end(),
            complete.map(|r| r.end).next_back().unwrap_or(wal.start())
        );
    }
    assert_eq!(start, wal.records()[1].start);
}

#[test]
fn zeros_end_the_wal_at_the_record_and_at_the_page() {
    let mut wal = builder(15);
    wal.commit(10, 1);
    let end = wal.position();
    let filled = [wal.bytes(), &[0; 9000]].concat();
    let mut decoder = decoder_at(15, wal.start());
    assert_eq!(decode(&mut decoder, &filled).1, Err(DecodeError::EndOfWal { at: end }));
    assert_eq!((decoder.record_end(), decoder.position()), (end, end));

    // Filled exactly to the end of the page, so that a page header is what lacks.
    let room = PAGE_BYTES - end.get() % PAGE_BYTES;
    wal.record_body(10, 0, 3, &vec![0; room as usize - 24]);
    let filled = [wal.bytes(), &[0; 9000]].concat();
    let fault = decode(&mut decoder_at(15, wal.start()), &filled).1;
    assert_eq!(fault, Err(DecodeError::EndOfWal { at: wal.position() }));

    // In the middle of a record, too: it was never written to its end.
    let start = wal.ordinary(4, 20_000);
    let torn = [&wal.bytes()[..2 * PAGE_BYTES as usize], &[0; 9000]].concat();
    let fault = decode(&mut decoder_at(15, wal.start()), &torn).1;
    assert_eq!(fault, Err(DecodeError::EndOfWal { at: start }));
}

#[test]
fn after_an_error_the_good_bytes_can_follow() {
    let mut wal = builder(15);
    wal.commit(10, 1);
    let second = wal.commit(11, 2);
    wal.ordinary(12, 20_000);
    wal.commit(12, 3);
    let mut bad = wal.bytes().to_vec();
    bad[second.since(wal.start()) as usize + 30] ^= 1;
    let mut decoder = decoder_at(15, wal.start());
    let (events, result) = decode(&mut decoder, &bad);
    assert_eq!(events.len(), 1);
    assert!(matches!(result, Err(DecodeError::BadCrc { lsn, .. }) if lsn == second));
    assert_eq!(decoder.position(), second);
    let (events, result) = decode(&mut decoder, &wal.bytes()[second.since(wal.start()) as usize..]);
    assert_eq!((events.len(), result), (2, Ok(())));
}

#[test]
fn a_record_that_was_never_ours_is_found_by_its_chain() {
    let mut wal = builder(15);
    wal.commit(10, 1);
    let mut other = wal.clone();
    let expected = wal.ordinary(9, 64);
    other.commit(11, 1);
    other.commit(11, 1);
    wal.commit(12, 2);
    let gap = wal.records()[1].end;
    let at = gap.since(wal.start()) as usize;
    assert_ne!(other.records()[1].end, gap);
    // The other history continues at the same place with a record of the same length.
    let mut third = builder(15);
    third.commit(10, 1);
    third.ordinary(9, 20);
    third.ordinary(9, 64 - 20 - 32);
    third.ordinary(9, 8);
    let bytes = [
        &wal.bytes()[..at],
        &third.bytes()[third.records()[3].start.since(wal.start()) as usize..],
    ]
    .concat();
    let fault = decode(&mut decoder_at(15, wal.start()), &bytes).1.unwrap_err();
    assert!(
        matches!(fault, DecodeError::BadPrev { lsn, expected: e, .. } if lsn == gap && e == expected),
        "{fault:?}"
    );
}

#[test]
fn pages_of_other_wal_are_refused_by_name() {
    let mut wal = builder(15);
    wal.ordinary(3, 20_000);
    let field = |decoder: &mut Decoder| match decode(decoder, wal.bytes()).1 {
        Err(DecodeError::BadPage { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let at = |v, s, system, t, start| Decoder::new(v, s, system, t, Lsn::new(start));
    let (v, s, t, start) = (version(15), segments(1), timeline(3), 3 * MIB);
    assert_eq!(field(&mut at(version(16), s, SYSTEM, t, start)), PageField::Magic);
    assert_eq!(field(&mut at(v, s, SystemId::new(1), t, start)), PageField::SystemId);
    assert_eq!(field(&mut at(v, s, SYSTEM, timeline(2), start)), PageField::Timeline);
    assert_eq!(field(&mut at(v, s, SYSTEM, t, start + MIB)), PageField::Address);
    let mut elsewhere = at(v, segments(4), SYSTEM, t, start);
    assert_eq!(field(&mut elsewhere), PageField::InfoBits, "no long header is due there");
}

#[test]
fn a_new_timeline_begins_inside_a_copied_segment_and_never_goes_back() {
    let mut wal = WalBuilder::new(version(15), segments(1), SYSTEM, timeline(2), Lsn::new(MIB));
    wal.ordinary(3, 10_000);
    wal.set_timeline(timeline(3));
    wal.ordinary(3, 10_000);
    wal.end_of_recovery(5, timeline(2));
    assert_eq!(decode_all(15, &wal).len(), 1);
    wal.set_timeline(timeline(2));
    wal.ordinary(3, 10_000);
    let fault = decode(&mut decoder_at(15, wal.start()), wal.bytes()).1.unwrap_err();
    assert!(matches!(fault, DecodeError::BadPage { field: PageField::Timeline, .. }), "{fault:?}");
}

#[test]
fn an_overwritten_record_is_dropped_and_named() {
    let mut wal = builder(14);
    wal.commit(10, 1);
    let lost = wal.overwritten(20_000, 44);
    wal.commit(11, 2);
    let events = decode_all(14, &wal);
    assert_eq!(events[1].kind, EventKind::OverwriteContrecord { lsn: lost, time: 44 });
    assert_eq!(events[1].prev, events[0].start);
    assert_eq!(events[2].prev, events[1].start);

    let mut wrong = builder(14);
    wrong.commit(10, 1);
    wrong.overwritten(20_000, 44);
    let mut bytes = wrong.bytes().to_vec();
    let record = wrong.records()[1].start.since(wrong.start()) as usize;
    bytes[record + 26] ^= 8;
    let crc = crc32c::crc32c_append(
        crc32c::crc32c(&bytes[record + 24..record + 42]),
        &bytes[record..record + 20],
    );
    bytes[record + 20..record + 24].copy_from_slice(&crc.to_le_bytes());
    let fault = decode(&mut decoder_at(14, wrong.start()), &bytes).1.unwrap_err();
    assert!(matches!(fault, DecodeError::BadRecord { .. }), "{fault:?}");
}

#[test]
fn a_switch_ends_its_segment() {
    for headers in [false, true] {
        let mut wal = builder(18);
        wal.commit(10, 1);
        let own_end = wal.records()[0].end.add(24);
        wal.switch(headers);
        wal.commit(11, 2);
        let events = decode_all(18, &wal);
        assert_eq!(events[1].kind, EventKind::Switch);
        assert_eq!(events[1].end, Lsn::new(4 * MIB));
        let mut decoder = decoder_at(18, wal.start());
        decode(&mut decoder, &wal.bytes()[..100_000]).1.unwrap();
        assert_eq!(decoder.record_end(), own_end, "the rest is not all there yet");
        decode(&mut decoder, &wal.bytes()[100_000..MIB as usize]).1.unwrap();
        assert_eq!(decoder.record_end(), Lsn::new(4 * MIB));
    }
}

#[test]
fn a_start_inside_a_record_is_refused() {
    let mut wal = builder(18);
    wal.commit(10, 1);
    for offset in [8, 39, 43] {
        let start = wal.start().add(offset);
        let fault = decode(&mut decoder_at(18, start), &wal.bytes()[offset as usize..]).1;
        assert_eq!(fault, Err(DecodeError::BadStart { lsn: start }));
    }
}

#[test]
fn big_records_are_not_kept() {
    let mut wal = builder(18);
    wal.ordinary(3, 5 << 20);
    wal.record_body(0, 0xB0, 0, &{
        let mut image = vec![254];
        image.extend((3u32 << 20).to_le_bytes());
        image.resize(5 + (3 << 20), 7);
        image
    });
    wal.end_prepared(true, 99, 7, 1 << 20, 0);
    let mut decoder = decoder_at(18, wal.start());
    let (events, _) = decode(&mut decoder, wal.bytes());
    assert_eq!(kinds(events), [EventKind::CommitPrepared { time: 7, xid: 99 }]);
    assert!(decoder.kept_capacity() <= 1 << 20);
}

#[test]
fn a_summary_holds_the_bounds_and_survives_encoding() {
    let mut wal = builder(17);
    let first = wal.commit(u32::MAX - 1, 500);
    wal.abort(5, 300);
    wal.end_prepared(true, 4, 900, 0, 0);
    wal.prepare(4_000, 10_000);
    wal.parameter_change(50, 1);
    wal.parameter_change(20, 0);
    wal.checkpoint(false, Lsn::new(0x30_0028), false);
    (0..RESTORE_POINTS_MAX + 1).for_each(|n| {
        wal.restore_point(&format!("point {n}"), n as i64);
    });
    let mut decoder = decoder_at(17, wal.start());
    let mut running = Summary::default();
    decoder.feed(wal.bytes(), &mut |event| running.note(&event)).unwrap();
    let summary = running.finish(&mut decoder);
    assert_eq!((summary.least_time, summary.greatest_time), (Some(300), Some(900)));
    assert_eq!((summary.least_xid, summary.greatest_xid), (Some(u32::MAX - 1), Some(5)));
    assert_eq!(summary.first_record, Some(first));
    assert_eq!(summary.last_record, wal.records().last().map(|r| r.start));
    assert_eq!(summary.last_record_end, Some(wal.position()));
    assert_eq!(summary.parameter_change.map(|m| m.max_wal_senders), Some(50));
    assert!(summary.full_page_writes_off && summary.wal_level_minimal && summary.checkpoint);
    assert!(!summary.end_of_recovery);
    assert_eq!(summary.restore_points.len(), RESTORE_POINTS_MAX);
    assert!(summary.more_restore_points);
    let bytes = minicbor::to_vec(&summary).unwrap();
    assert_eq!(minicbor::decode::<Summary>(&bytes).unwrap(), summary);
    assert_eq!(running.finish(&mut decoder), Summary::default(), "the next run is empty so far");
}

#[test]
fn a_start_behind_the_head_of_a_switch_passes_over_its_segment() {
    let mut wal = builder(18);
    wal.commit(10, 1);
    // Leave room for eight bytes of the switch record in the segment; the rest of it opens the next one.
    while wal.position().get() % MIB != MIB - 8 {
        let room = PAGE_BYTES - wal.position().get() % PAGE_BYTES;
        let last_page = MIB - wal.position().get() % MIB <= PAGE_BYTES;
        let bytes = if last_page { room as usize - 24 - 8 } else { room as usize };
        wal.record_body(10, 0, 3, &vec![0; bytes]);
    }
    wal.switch(false);
    wal.commit(11, 2);
    assert_eq!(decode_all(18, &wal)[1].end, Lsn::new(5 * MIB));
    let (events, result) =
        decode(&mut decoder_at(18, Lsn::new(4 * MIB)), &wal.bytes()[MIB as usize..]);
    assert_eq!((kinds(events), result), (vec![EventKind::Commit { time: 2 }], Ok(())));
}

#[test]
fn where_decoding_goes_on_the_chain_is_checked() {
    let mut wal = builder(16);
    wal.commit(10, 1);
    // Up to the end of the page, so that it goes on at a page's head.
    let room = PAGE_BYTES - wal.position().get() % PAGE_BYTES;
    wal.record_body(10, 0, 3, &vec![0; room as usize - 24]);
    let end = wal.position();
    let mut decoder = decoder_at(16, wal.start());
    decode(&mut decoder, wal.bytes()).1.unwrap();
    let point = decoder.resume_point();
    assert_eq!((point.at, point.switched), (end, false));
    assert_eq!(point.timeline, Some(timeline(3)));

    let resumed = |bytes: &[u8]| {
        let mut decoder = Decoder::resume(version(16), segments(1), SYSTEM, timeline(3), point);
        decode(&mut decoder, bytes).1
    };
    let mut stranger = WalBuilder::new(version(16), segments(1), SYSTEM, timeline(3), end);
    stranger.ordinary(9, 100);
    let fault = resumed(stranger.bytes()).unwrap_err();
    assert!(
        matches!(fault, DecodeError::BadPrev { expected, .. } if Some(expected) == point.last_record)
    );
    // Neither is a page in the middle of a record passed over, nor are zeros.
    let zeros = resumed(&[0; 9000]);
    assert_eq!(zeros, Err(DecodeError::EndOfWal { at: end }));
    wal.ordinary(9, 20_000);
    let middle = end.since(wal.start()) as usize + PAGE_BYTES as usize;
    let mut moved = wal.bytes()[middle..].to_vec();
    moved[8..16].copy_from_slice(&end.get().to_le_bytes());
    let fault = resumed(&moved).unwrap_err();
    assert!(matches!(fault, DecodeError::BadPage { field: PageField::Remaining, .. }), "{fault:?}");
}
