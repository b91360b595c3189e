//! Targets of made-up demand, and properties that hold for any.

use proptest::prelude::*;

use super::*;

const WINDOW: Duration = Duration::from_secs(600);
const REFILL: Duration = Duration::from_millis(500);

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn a_burst_is_kept_in_reserve_and_fades() {
    let start = Instant::now();
    let mut demand = Demand::new(WINDOW);
    for request in 0..10 {
        demand.record(start + Duration::from_millis(100 * request));
    }
    let wanted = |after| demand.wanted(REFILL, 2, 20, start + seconds(after));
    assert_eq!([wanted(1), wanted(300)], [10, 10]);
    assert_eq!([wanted(450), wanted(590), wanted(600)], [5, 2, 2]);
    assert_eq!(demand.wanted(REFILL, 2, 7, start), 7);
}

#[test]
fn a_steady_rate_needs_what_is_asked_for_meanwhile() {
    let start = Instant::now();
    let mut demand = Demand::new(seconds(10));
    for second in 0..60 {
        for _ in 0..2 {
            demand.record(start + seconds(second));
        }
    }
    // 2 per second for 10 remembered ones, averaged over 30.
    assert_eq!(demand.within(seconds(30), 59), 20);
    let mut demand = Demand::new(WINDOW);
    for second in 0..60 {
        demand.record(start + seconds(second));
        demand.record(start + seconds(second));
    }
    assert_eq!(demand.within(seconds(5), 59), 10);
    assert_eq!(demand.wanted(seconds(5), 1, 100, start + seconds(59)), 10);
}

#[test]
fn shares_are_cut_where_most_is() {
    let mut wanted = [1, 8, 4];
    share(&mut wanted, 9);
    assert_eq!(wanted, [1, 4, 4]);
    share(&mut wanted, 0);
    assert_eq!(wanted, [0, 0, 0]);
}

#[test]
fn addresses_and_memory_limit() {
    let limits = Limits {
        max_memory_bytes: 64 << 20,
        bytes_per_hull: Some(8 << 20),
        address_headroom: 4,
        addresses: Some(8),
    };
    assert_eq!((limits.total(), limits.is_by_addresses()), (4, true));
    let more = Limits {
        addresses: Some(100),
        ..limits
    };
    assert_eq!((more.total(), more.is_by_addresses()), (8, false));
    let unknown = Limits {
        addresses: None,
        bytes_per_hull: None,
        ..limits
    };
    assert_eq!(unknown.total(), 10);
    let none = Limits {
        addresses: Some(2),
        ..limits
    };
    assert_eq!(none.total(), 0);
}

proptest! {
    #[test]
    fn wanted_is_within_bounds_and_fades_without_demand(
        times in prop::collection::vec(0..900_u64, 0..60), min in 0..5_usize, room in 0..20_usize,
    ) {
        let start = Instant::now();
        let mut times = times;
        times.sort_unstable();
        let mut demand = Demand::new(WINDOW);
        for time in &times {
            demand.record(start + seconds(*time));
            let wanted = demand.wanted(REFILL, min, min + room, start + seconds(*time));
            prop_assert!((min..=min + room).contains(&wanted));
            prop_assert!(wanted >= 1.min(min + room));
        }
        let last = times.last().copied().unwrap_or(0);
        let mut before = usize::MAX;
        for after in 0..700 {
            let wanted = demand.wanted(REFILL, min, min + room, start + seconds(last + after));
            prop_assert!(wanted <= before, "rose without demand after {after} s");
            before = wanted;
        }
        prop_assert_eq!(before, min);
        prop_assert!(demand.counts.len() <= 600);
    }

    #[test]
    fn a_steady_value_falls_slowly_and_never_below_what_is_wanted(
        wanted in prop::collection::vec(0..12_usize, 1..200), patience in 1..20_u64,
    ) {
        let start = Instant::now();
        let mut steady = Steady::default();
        let (mut before, mut fell): (usize, Option<u64>) = (0, None);
        for (second, wanted) in (0_u64..).zip(&wanted) {
            let value = steady.update(*wanted, seconds(patience), start + seconds(second));
            prop_assert!(value >= *wanted);
            if value < before {
                prop_assert_eq!(value, before - 1);
                prop_assert!(fell.is_none_or(|at| second - at >= patience));
                fell = Some(second);
            }
            before = value;
        }
    }

    #[test]
    fn shares_never_exceed_the_total(wanted in prop::collection::vec(0..50_usize, 0..6), total in 0..100_usize) {
        let mut shared = wanted.clone();
        share(&mut shared, total);
        prop_assert!(shared.iter().sum::<usize>() <= total);
        prop_assert!(shared.iter().zip(&wanted).all(|(after, before)| after <= before));
        if wanted.iter().sum::<usize>() <= total {
            prop_assert_eq!(shared, wanted);
        }
    }
}
