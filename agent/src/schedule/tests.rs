use super::*;
use proptest::prelude::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn schedule(text: &str, zone: &str) -> Schedule {
    Schedule::parse(text, TimeZone::get(zone).unwrap()).unwrap()
}

#[test]
fn a_daily_run_follows_the_clock_on_the_wall() {
    let daily = schedule("0 2 * * *", "America/New_York");
    assert_eq!(daily.next_after(at("2026-01-10T06:59:59Z")), Some(at("2026-01-10T07:00:00Z")));
    assert_eq!(daily.next_after(at("2026-01-10T07:00:00Z")), Some(at("2026-01-11T07:00:00Z")));
    assert_eq!(daily.next_after(at("2026-07-10T00:00:00Z")), Some(at("2026-07-10T06:00:00Z")));
}

#[test]
fn a_run_that_falls_into_a_gap_comes_right_after_it() {
    // Clocks in Berlin went from 02:00 to 03:00 on 2026-03-29, at 01:00 UTC.
    for due in ["0 2 29 3 *", "30 2 29 3 *", "59 2 29 3 *"] {
        let spring = schedule(due, "Europe/Berlin");
        assert_eq!(spring.next_after(at("2026-03-28T12:00:00Z")), Some(at("2026-03-29T01:00:00Z")));
        assert_eq!(
            spring.next_after(at("2026-03-29T01:00:00Z")).map(|t| t > at("2027-01-01T00:00:00Z")),
            Some(true)
        );
    }
}

#[test]
fn a_run_in_a_repeated_hour_comes_once() {
    // 03:00 became 02:00 on 2026-10-25 at 01:00 UTC; 02:30 was at 00:30 and again at 01:30 UTC.
    let daily = schedule("30 2 * * *", "Europe/Berlin");
    assert_eq!(daily.next_after(at("2026-10-24T12:00:00Z")), Some(at("2026-10-25T00:30:00Z")));
    for between in ["2026-10-25T00:30:00Z", "2026-10-25T01:10:00Z", "2026-10-25T01:30:00Z"] {
        assert_eq!(daily.next_after(at(between)), Some(at("2026-10-26T01:30:00Z")));
    }
}

#[test]
fn days_restricted_twice_suit_in_either_way() {
    let either = schedule("0 0 13 * fri", "UTC");
    let mut due = at("2026-11-01T00:00:00Z");
    let expected = [
        "2026-11-06",
        "2026-11-13",
        "2026-11-20",
        "2026-11-27",
        "2026-12-04",
        "2026-12-11",
        "2026-12-13",
    ];
    for day in expected {
        due = either.next_after(due).unwrap();
        assert_eq!(due, at(&format!("{day}T00:00:00Z")));
    }
}

#[test]
fn a_run_is_missed_if_one_was_due_since_the_last() {
    let daily = schedule("0 2 * * *", "UTC");
    let last = at("2026-11-20T02:00:05Z");
    assert!(!daily.missed(Some(last), at("2026-11-21T01:59:59Z")));
    assert!(daily.missed(Some(last), at("2026-11-21T02:00:00Z")));
    assert!(daily.missed(None, last));
}

#[test]
fn nonsense_is_refused_with_the_reason() {
    for bad in [
        "",
        "* * * *",
        "* * * * * *",
        "61 * * * *",
        "* 24 * * *",
        "* * * * 8",
        "* * * * frog",
        "* * * * 1/0",
    ] {
        let error = Schedule::parse(bad, TimeZone::UTC).unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{bad}");
        assert!(error.remedy_text().is_some());
    }
    assert_eq!(schedule("0 0 30 2 *", "UTC").next_after(at("2026-01-01T00:00:00Z")), None);
}

/// A field of single days and ranges, and the days it means, from 0 for Sunday.
fn any_weekdays() -> impl Strategy<Value = (String, [bool; 7])> {
    let part = (0usize..=7, 0usize..=7, any::<bool>(), any::<bool>());
    proptest::collection::vec(part, 1..4).prop_map(|parts| {
        let mut wanted = [false; 7];
        let name = |day: usize, named: bool| match named {
            true => WEEKDAYS[day % 7].to_string(),
            false => day.to_string(),
        };
        let text = parts.iter().map(|&(first, last, is_range, named)| {
            let (first, last) =
                (first.min(last), if is_range { first.max(last) } else { first.min(last) });
            // A named Sunday is day 0, wherever it stands.
            let (low, high) = if named { (first % 7, last % 7) } else { (first, last) };
            let mut day = low;
            loop {
                wanted[day % 7] = true;
                if day % 7 == high % 7 && !(low == 0 && high == 7 && day == 0) {
                    break;
                }
                day += 1;
            }
            match is_range {
                true => format!("{}-{}", name(first, named), name(last, named)),
                false => name(first, named),
            }
        });
        (text.collect::<Vec<_>>().join(","), wanted)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn weekdays_are_translated((text, wanted) in any_weekdays(), start in 0i64..2_000_000_000) {
        let schedule = Schedule::parse(&format!("17 5 * * {text}"), TimeZone::UTC).unwrap();
        let mut now = Timestamp::from_second(start).unwrap();
        for _ in 0..8 {
            let next = schedule.next_after(now).unwrap();
            // Day by day: no day before `next` was wanted, and `next` is.
            let mut day = now.to_zoned(TimeZone::UTC).date().at(5, 17, 0, 0);
            loop {
                let due = day.to_zoned(TimeZone::UTC).unwrap();
                if due.timestamp() > now && wanted[due.weekday().to_sunday_zero_offset() as usize] {
                    prop_assert_eq!(due.timestamp(), next, "{}", text);
                    break;
                }
                day = day.tomorrow().unwrap();
            }
            now = next;
        }
    }

    #[test]
    fn the_next_run_is_later_and_nothing_is_skipped(start in 1_700_000_000i64..1_900_000_000, hour in 0u32..24, minute in 0u32..60) {
        for zone in ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"] {
            let daily = schedule(&format!("{minute} {hour} * * *"), zone);
            let now = Timestamp::from_second(start).unwrap();
            let next = daily.next_after(now).unwrap();
            prop_assert!(next > now);
            prop_assert!(next.duration_since(now) <= SignedDuration::from_hours(49));
            // Asked at any moment before, it says the same.
            let half = now + next.duration_since(now) / 2;
            prop_assert_eq!(daily.next_after(half).unwrap(), next);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[0-9*/,a-z? -]{0,30}") {
        let _ = Schedule::parse(&text, TimeZone::UTC);
    }
}
