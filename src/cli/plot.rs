//! The distribution of latencies as a picture: in the terminal, or as SVG.

use std::fmt::Write;
use std::path::Path;

use hdrhistogram::Histogram;
use plotters::prelude::*;

/// The columns of the terminal's longest bar.
const BAR: u64 = 50;

/// A bar for each doubling of the latency, in nanoseconds.
pub(super) fn bars(latency: &Histogram<u64>) -> String {
    let mut rows = Vec::new();
    let mut low = 1_000_u64;
    while low <= latency.max() {
        rows.push((low, latency.count_between(low, low * 2 - 1)));
        low *= 2;
    }
    let first = rows.iter().position(|(_, count)| *count > 0).unwrap_or(0);
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let mut text = String::new();
    for (low, count) in rows.into_iter().skip(first) {
        let bar = usize::try_from((count * BAR).div_ceil(most)).unwrap_or(0);
        // Writing to a string does not fail.
        writeln!(text, "{:>10} {:<50} {count}", shown(low), "\u{2588}".repeat(bar)).unwrap_or_default();
    }
    text
}

/// A time with the unit that suits it.
pub(super) fn shown(nanos: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let nanos = nanos as f64;
    if nanos < 1e6 {
        format!("{:.1} us", nanos / 1e3)
    } else if nanos < 1e9 {
        format!("{:.2} ms", nanos / 1e6)
    } else {
        format!("{:.2} s", nanos / 1e9)
    }
}

/// Latency over percentile, the percentiles stretched towards 100 as HdrHistogram plots are.
///
/// # Errors
/// Where the file cannot be written.
pub(super) fn svg(
    latency: &Histogram<u64>,
    title: &str,
    path: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    // How many hundredths of nines a percentile has, and its name.
    const NINES: [(i32, &str); 6] =
        [(0, "0"), (30, "50"), (100, "90"), (200, "99"), (300, "99.9"), (400, "99.99")];
    const TEXT: (&str, i32) = ("sans-serif", 15);
    let points = (0..=400_i32).map(|nines| {
        let percentile = 100.0 * (1.0 - 10_f64.powf(-f64::from(nines) / 100.0));
        (nines, latency.value_at_percentile(percentile).max(1))
    });
    let points: Vec<(i32, u64)> = points.collect();
    // A little room below and above; microseconds and seconds find place in one picture by the logarithm.
    let least = points.first().map_or(1, |(_, value)| *value);
    let most = points.last().map_or(1, |(_, value)| *value);
    let (bottom, top) = ((least - least / 4).max(1), most.saturating_add(most / 4).max(least + 2));
    let root = SVGBackend::new(path, (900, 500)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(20)
        .x_label_area_size(50)
        .y_label_area_size(95)
        .build_cartesian_2d(
            (0..400).with_key_points(NINES.map(|(at, _)| at).to_vec()),
            (bottom..top).log_scale(),
        )?;
    let label = |nines: &i32| {
        let named = NINES.iter().find(|(at, _)| at == nines);
        named.map_or(String::new(), |(_, name)| (*name).to_owned())
    };
    chart
        .configure_mesh()
        .x_desc("percentile")
        .y_desc("latency")
        .x_label_formatter(&label)
        .y_label_formatter(&|nanos| shown(*nanos))
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .bold_line_style(BLACK.mix(0.15))
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(LineSeries::new(points, BLUE.stroke_width(2)))?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latency() -> Histogram<u64> {
        let mut latency = Histogram::new(3).unwrap();
        latency.record_n(1_500, 10).unwrap();
        latency.record_n(9_000, 5).unwrap();
        latency
    }

    #[test]
    fn bars_are_as_long_as_their_counts() {
        let bars = bars(&latency());
        let lengths: Vec<_> = bars.lines().map(|line| line.matches('\u{2588}').count()).collect();
        assert_eq!(lengths, [50, 0, 0, 25]);
        assert_eq!(
            bars.lines().next().map(str::trim_start).map(|line| line.starts_with("1.0 us")),
            Some(true)
        );
        assert!(super::bars(&Histogram::new(3).unwrap()).is_empty());
    }

    #[test]
    fn times_have_the_unit_that_suits_them() {
        assert_eq!([shown(1_500), shown(2_500_000), shown(3_000_000_000)], ["1.5 us", "2.50 ms", "3.00 s"]);
    }

    #[test]
    fn plot_is_written_to_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("latency.svg");
        svg(&latency(), "a title", &path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("<svg") && text.contains("a title") && text.contains("99.99"), "{text}");
        assert!(svg(&latency(), "a title", &dir.path().join("no/folder.svg")).is_err());
    }
}
