//! Curves as SVG, by hand: both axes logarithmic where the figures ask for it, one line a series.

use std::fmt::Write;

/// A line: its name, and its points.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// What it shows.
    pub name: String,
    /// Where it goes, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// A picture of some lines.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// The file's name, without an ending.
    pub file: String,
    /// What it is about.
    pub title: String,
    /// What grows to the right, with its unit.
    pub x: String,
    /// What grows to the top, with its unit.
    pub y: String,
    /// The lines.
    pub series: Vec<Series>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 70.0;
const COLOURS: [&str; 6] = ["#0b6e99", "#d9730d", "#448361", "#ad1a72", "#6940a5", "#64473a"];

impl Curve {
    /// The picture. `note` says where the figures come from.
    pub fn svg(&self, note: &str) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Axis::over(points().map(|point| point.0), Start::AtTheFirst);
        let y = Axis::over(points().map(|point| point.1), Start::AtZero);
        let place = |&(px, py): &(f64, f64)| {
            (LEFT + x.share(px) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y.share(py) * (HEIGHT - TOP - BOTTOM))
        };
        let mut out = String::new();
        let text = |x: f64, y: f64, how: &str, text: &str| {
            format!("<text x=\"{x:.1}\" y=\"{y:.1}\" {how}>{}</text>\n", escape(text))
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"11\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>"
        );
        out += &text(LEFT, 22.0, "font-size=\"14\"", &self.title);
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        let _ = writeln!(out, "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#333\"/>");
        for tick in x.ticks() {
            let (at, _) = place(&(tick, y.low));
            out += &text(at, bottom + 15.0, "text-anchor=\"middle\"", &number(tick));
        }
        for tick in y.ticks() {
            let (_, at) = place(&(x.low, tick));
            let _ = writeln!(out, "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#ddd\"/>");
            out += &text(LEFT - 5.0, at + 4.0, "text-anchor=\"end\"", &number(tick));
        }
        out += &text((LEFT + right) / 2.0, bottom + 32.0, "text-anchor=\"middle\"", &self.x);
        let middle = f64::midpoint(TOP, bottom);
        out += &text(14.0, middle, &format!("text-anchor=\"middle\" transform=\"rotate(-90 14 {middle})\""), &self.y);
        for (index, (series, colour)) in self.series.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let places: Vec<(f64, f64)> = series.points.iter().map(place).collect();
            let line: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(out, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", line.join(" "));
            for (x, y) in places {
                let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
            }
            let style = format!("fill=\"{colour}\"");
            out += &text(LEFT + 10.0, TOP + 12.0 + 15.0 * index as f64, &style, &series.name);
        }
        out += &text(LEFT, HEIGHT - 10.0, "fill=\"#777\" font-size=\"10\"", note);
        out + "</svg>\n"
    }
}

/// Where an axis begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    AtZero,
    AtTheFirst,
}

/// The range of an axis: linear, or logarithmic where the largest is much larger than the least.
struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, start: Start) -> Self {
        let (least, most) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, 0.0), |(least, most), value| (f64::min(least, value), f64::max(most, value)));
        if !least.is_finite() || most <= 0.0 {
            return Self { low: 0.0, high: 1.0, logarithmic: false };
        }
        let logarithmic = least > 0.0 && most / least > 20.0;
        let low = if logarithmic || start == Start::AtTheFirst && least < most { least } else { 0.0 };
        let high = if start == Start::AtZero { most * 1.15 } else { most };
        Self { low, high, logarithmic }
    }

    /// How far along the axis a value is, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let along = |value: f64| if self.logarithmic { value.max(self.low).ln() } else { value };
        (along(value) - along(self.low)) / (along(self.high) - along(self.low))
    }

    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let steps = (self.high / self.low).log2().floor() as u32;
            let every = steps.div_ceil(8).max(1);
            (0..=steps).step_by(every as usize).map(|step| self.low * f64::from(1 << step)).collect()
        } else {
            (0..=5).map(|step| self.low + (self.high - self.low) * f64::from(step) / 5.0).collect()
        }
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(f64, f64)]) -> Curve {
        let series = Series { name: "a < b".into(), points: points.to_vec() };
        Curve { file: "c".into(), title: "T".into(), x: "x".into(), y: "y".into(), series: vec![series] }
    }

    #[test]
    fn a_picture_has_its_points_within_its_frame() {
        let svg = curve(&[(64.0, 500.0), (1024.0, 600.0), (8192.0, 550.0)]).svg("here & now");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a &lt; b") && svg.contains("here &amp; now"));
        let line = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let points: Vec<(f64, f64)> = line
            .split(' ')
            .map(|point| point.split_once(',').unwrap())
            .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
            .collect();
        assert_eq!(points.len(), 3);
        assert!(points.iter().all(|(x, y)| (LEFT..=WIDTH).contains(x) && (TOP..=HEIGHT).contains(y)), "{points:?}");
        assert!(points.is_sorted_by(|a, b| a.0 < b.0));
        assert!(points[1].1 < points[0].1, "more is higher");
    }

    #[test]
    fn nothing_to_show_is_no_reason_to_fail() {
        for points in [&[][..], &[(1.0, 1.0)], &[(0.0, 0.0), (1.0, f64::NAN)]] {
            assert!(!curve(points).svg("").contains("points=\"NaN"), "{points:?}");
        }
    }
}
