//! The figures of a run: rounds, medians, and the ratio of vestibule to each peer within the same round.
#![allow(clippy::format_push_string, reason = "a table is put together once")]

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::contender::{Contender, DIRECT, OURS, is_peer};
use super::median;

/// A figure of each round, for each contender.
pub(crate) type Rounds = BTreeMap<&'static str, Vec<f64>>;

/// One line of the table.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    /// What is compared: less is better.
    pub(crate) figures: Rounds,
    /// Further figures, by name: for JSON alone.
    pub(crate) further: Vec<(&'static str, Rounds)>,
}

/// vestibule's figure divided by another contender's, round by round: disturbances of the machine affect both figures of a
/// round.
#[derive(Clone, Copy)]
struct Ratio {
    median: f64,
    least: f64,
    most: f64,
}

impl Ratio {
    /// Rounds in which there is nothing to divide by are left out.
    fn new(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        let pairs = ours.iter().zip(theirs).filter(|(_, theirs)| **theirs > 0.0 && theirs.is_finite());
        let ratios: Vec<f64> = pairs.map(|(ours, theirs)| ours / theirs).collect();
        let least = ratios.iter().copied().reduce(f64::min)?;
        let most = ratios.iter().copied().reduce(f64::max)?;
        Some(Self { median: median(ratios), least, most })
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "min": self.least, "max": self.most })
    }
}

impl Row {
    fn median(&self, name: &str) -> Option<f64> {
        self.figures.get(name).cloned().map(median)
    }

    fn ratio(&self, peer: &str) -> Option<Ratio> {
        Ratio::new(self.figures.get(OURS)?, self.figures.get(peer)?)
    }

    /// vestibule against the best peer of each round.
    fn ratio_to_best(&self) -> Option<Ratio> {
        let ours = self.figures.get(OURS)?;
        let peers = self.figures.iter().filter(|(name, _)| is_peer(name));
        let peers: Vec<&Vec<f64>> = peers.map(|(_, figures)| figures).collect();
        let best = |round: usize| {
            let figures = peers.iter().filter_map(|figures| figures.get(round)).copied();
            figures.fold(f64::INFINITY, f64::min)
        };
        let best: Vec<f64> = (0..ours.len()).map(best).collect();
        Ratio::new(ours, &best)
    }

    pub(crate) fn json(&self) -> Value {
        let medians: BTreeMap<_, _> = self.figures.keys().map(|name| (*name, self.median(name))).collect();
        let mut ratios: BTreeMap<_, _> = self
            .figures
            .keys()
            .filter(|name| **name != OURS && **name != DIRECT)
            .filter_map(|name| Some((*name, self.ratio(name)?.json())))
            .collect();
        ratios.extend(self.ratio_to_best().map(|ratio| ("best", ratio.json())));
        let further: BTreeMap<_, _> = self.further.iter().cloned().collect();
        json!({ "name": self.name, "unit": self.unit, "medians": medians, "rounds": self.figures,
            "ratios": ratios, "further": further })
    }
}

/// Prints all rows: a column for each contender, then the ratio of vestibule to the best peer with its minimum and maximum,
/// then the ratio to each peer.
pub(crate) fn print(rows: &[Row], contenders: &[Contender]) {
    let peers: Vec<&str> = contenders.iter().filter(|one| one.is_compared()).map(|one| one.name).collect();
    let mut head = format!("\n{:<38}{:<8}", "work", "unit");
    for contender in contenders {
        head += &format!("{:>16}", contender.name);
    }
    if !peers.is_empty() {
        head += &format!("{:>9}{:>14}", "of best", "min..max");
    }
    for peer in &peers {
        head += &format!("{:>18}", format!("of {peer}"));
    }
    println!("{head}");
    for row in rows {
        let figure = |name: &str| row.median(name).map_or("-".to_owned(), |figure| format!("{figure:.2}"));
        let mut line = format!("{:<38}{:<8}", row.name, row.unit);
        for contender in contenders {
            line += &format!("{:>16}", figure(contender.name));
        }
        if !peers.is_empty() {
            let ratio = row.ratio_to_best();
            let median = ratio.map_or("-".to_owned(), |ratio| format!("{:.2}", ratio.median));
            let spread =
                ratio.map_or("-".to_owned(), |ratio| format!("{:.2}..{:.2}", ratio.least, ratio.most));
            line += &format!("{median:>9}{spread:>14}");
        }
        for peer in &peers {
            let ratio = row.ratio(peer).map_or("-".to_owned(), |ratio| format!("{:.2}", ratio.median));
            line += &format!("{ratio:>18}");
        }
        println!("{line}");
    }
}
