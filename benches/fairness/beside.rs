//! B with each neighbour, in pairs: each measurement is divided by that of B alone just before and just after it, so that
//! disturbances of the machine affect both. The result is the median of many such ratios with its confidence interval.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::neighbour::{self, Neighbour};
use super::stage::median;
use super::{Bench, Figures, Options};

/// The figures of B, and whether more is better.
const COLUMNS: [(&str, bool); 6] = [
    ("p95", false),
    ("p99", false),
    ("round trips/s", true),
    ("p95 of new sessions", false),
    ("p99 of new sessions", false),
    ("new sessions/s", true),
];

/// The highest acceptable ratio.
const MOST: f64 = 1.10;

/// The ratios of one neighbour, round by round.
#[derive(Clone, Default)]
struct Ratios {
    /// Through B's proxy, to B alone.
    shared: Vec<Figures>,
    /// Through a proxy of its own, to B alone.
    apart: Vec<Figures>,
    /// The first to the second: what sharing the proxy costs beyond sharing the machine.
    sharing: Vec<Figures>,
    /// The neighbour's activity through B's proxy.
    did: Vec<f64>,
}

/// In each round B is measured alone, then with the first neighbour through B's proxy and through a proxy of its own, then
/// alone again, and so on. The order of neighbours is reversed from round to round.
pub(super) fn measure(bench: &Bench, other: &Bench, options: &Options) -> Vec<Value> {
    let (effort, neighbours) = (options.effort(), options.neighbours());
    let _awake = neighbour::awake(bench);
    let b_beside = |neighbour: Option<Neighbour>, proxy| {
        neighbour::beside(neighbour, proxy, effort.beside / 4, || bench.load_of_b(effort.beside))
    };
    let (mut all, mut alone, mut noise) = (vec![Ratios::default(); neighbours.len()], Vec::new(), Vec::new());
    for round in 0..options.rounds() {
        let mut order: Vec<_> = neighbours.iter().copied().enumerate().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        let mut before = b_beside(None, bench).0;
        alone.push(before);
        for (turn, (place, neighbour)) in order.into_iter().enumerate() {
            // The first of the two is nearer in time to the measurement before; the order alternates.
            let ((shared, did), (apart, _)) = if (round / 2 + turn) % 2 == 0 {
                let shared = b_beside(Some(neighbour), bench);
                (shared, b_beside(Some(neighbour), other))
            } else {
                let apart = b_beside(Some(neighbour), other);
                (b_beside(Some(neighbour), bench), apart)
            };
            let after = b_beside(None, bench).0;
            let mean = before.with(after, |before, after| (before * after).sqrt());
            let over = |figures: Figures, base: Figures| figures.with(base, |figure, base| figure / base);
            all[place].did.push(did);
            all[place].shared.push(over(shared, mean));
            all[place].apart.push(over(apart, mean));
            all[place].sharing.push(over(shared, apart));
            noise.push(over(after, before));
            alone.push(after);
            before = after;
        }
    }
    print_rows(&neighbours, &all, &alone, &noise)
}

/// Prints the table, and returns it as JSON.
fn print_rows(neighbours: &[Neighbour], all: &[Ratios], alone: &[Figures], noise: &[Figures]) -> Vec<Value> {
    println!(
        "B at half of its limits: 4 KiB round trips at 2,000/s, and 1,000 new sessions/s, in intervals of a hundred; \
         beside A over alone just before and after: the median of {} rounds, and where it lies with 95 %",
        all[0].shared.len()
    );
    let heads = COLUMNS.map(|(name, _)| format!("{name:>22}"));
    println!("  {:<52} {}", "A", heads.join(" "));
    let usual = |column: usize| middle(alone, column).1;
    let figures = COLUMNS.iter().enumerate().map(|(column, (_, is_rate))| {
        let unit = if *is_rate { "" } else { " us" };
        format!("{:>22}", format!("{:.0}{unit}", usual(column)))
    });
    println!("  {:<52} {}", "is not there", figures.collect::<Vec<_>>().join(" "));
    let figures = COLUMNS.iter().enumerate();
    let figures: BTreeMap<_, _> = figures.map(|(column, (name, _))| (*name, usual(column))).collect();
    let mut report = vec![json!({ "name": "alone", "figures": figures })];
    report.push(print_row("is not there, over the time before", noise));
    let mut verdicts = Vec::new();
    for (neighbour, ratios) in neighbours.iter().zip(all) {
        let did = neighbour.activity_text(median(ratios.did.clone()));
        report.push(print_row(&format!("{} ({did})", neighbour.name()), &ratios.shared));
        report.push(print_row("  through a proxy of its own", &ratios.apart));
        report.push(print_row("  the first over the second", &ratios.sharing));
        verdicts.extend(COLUMNS.iter().enumerate().map(|(column, (name, is_more_better))| {
            let (low, median, high) = middle(&ratios.shared, column);
            let (best, median, worst) =
                if *is_more_better { (1.0 / high, 1.0 / median, 1.0 / low) } else { (low, median, high) };
            let verdict = match (worst <= MOST, median <= MOST, best <= MOST) {
                (true, ..) => "within 10 %",
                (false, true, _) => "within 10 % by its median, not with certainty",
                (_, false, true) => "beyond 10 % by its median, not with certainty",
                (_, _, false) => "beyond 10 %",
            };
            format!("  {}, {name}: {verdict}", neighbour.name())
        }));
    }
    println!("{}", verdicts.join("\n"));
    report
}

fn print_row(name: &str, ratios: &[Figures]) -> Value {
    print!("  {name:<52}");
    let mut columns = Vec::new();
    for (column, (figure, _)) in COLUMNS.into_iter().enumerate() {
        let (low, median, high) = middle(ratios, column);
        print!(" {:>22}", format!("{median:.2} ({low:.2} to {high:.2})"));
        columns.push(json!({ "figure": figure, "median": median, "low": low, "high": high }));
    }
    println!();
    json!({ "name": "beside", "a": name.trim(), "ratios": columns })
}

/// The median of a column, and the values that it lies between with 95 %: those whose ranks a fair coin would not leave
/// (Conover, "Practical Nonparametric Statistics", section 3.2).
fn middle(all: &[Figures], column: usize) -> (f64, f64, f64) {
    let mut values: Vec<_> = all.iter().map(|figures| figures.0[column]).collect();
    values.sort_by(f64::total_cmp);
    let count = values.len();
    let (mut probability, mut below, mut rank) = (0.5_f64.powi(i32::try_from(count).expect("few")), 0.0, 0);
    // Of so many tosses, at most `rank` heads.
    while below + probability <= 0.025 {
        below += probability;
        rank += 1;
        #[expect(clippy::cast_precision_loss, reason = "a few dozen")]
        let factor = (count + 1 - rank) as f64 / rank as f64;
        probability *= factor;
    }
    let low = rank.saturating_sub(1);
    let median = f64::midpoint(values[(count - 1) / 2], values[count / 2]);
    (values[low], median, values[count - 1 - low])
}

impl Figures {
    fn with(self, other: Self, merge: impl Fn(f64, f64) -> f64) -> Self {
        Self(std::array::from_fn(|column| merge(self.0[column], other.0[column])))
    }
}
