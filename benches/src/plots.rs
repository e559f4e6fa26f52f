//! Pictures of a report.

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};

use crate::report::{Entry, Report};

/// The library takes a size for the height of a line; letters come out at two thirds of it.
const FONT: (&str, u32) = ("sans-serif", 16);
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 89, 156),
    RGBColor(200, 80, 40),
    RGBColor(60, 140, 70),
    RGBColor(130, 80, 160),
    RGBColor(160, 130, 30),
    RGBColor(90, 90, 90),
];

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(crate) type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

/// Points of a curve and what it is called.
type Curve = (String, Vec<(f64, f64)>);

/// All pictures that the report has results for, with the names of their files.
///
/// # Errors
/// What the library reports.
pub fn draw(report: &Report) -> Result<Vec<(&'static str, String)>> {
    let mut pictures = Vec::new();
    let main = report.limits.iter().map(|limits| limits.threads).max().unwrap_or(1);
    let main: Vec<&Entry> = report.results.iter().filter(|entry| entry.threads == main).collect();
    if !main.is_empty() {
        pictures.push(("limit.svg", bars(&percents(&main), "percent of the measured limit", Some(100.0))?));
    }
    let sequences = |value: fn(&Entry) -> f64| by_length(&main, value);
    for (name, title, curves) in [
        ("sequence-time.svg", ("tokens of the sequence", "seconds"), sequences(|entry| entry.timing.median_s)),
        (
            "sequence-memory.svg",
            ("tokens of the sequence", "MiB held at most"),
            sequences(|entry| mebibytes(entry.peak_bytes)),
        ),
        ("threads.svg", ("threads", "times as fast as with the fewest"), by_threads(report)),
    ] {
        if curves.iter().any(|(_, points)| points.len() > 1) {
            let logarithmic = name.starts_with("sequence");
            pictures.push((name, lines(&curves, title, logarithmic)?));
        }
    }
    Ok(pictures)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn percents(entries: &[&Entry]) -> Vec<(String, f64)> {
    entries.iter().map(|entry| (entry.id.to_string(), entry.percent_of_limit)).collect()
}

/// The tokens of a shape such as `512 x 32 on 512 x 8, 64` or `1 x 512, rank 16`.
fn length(entry: &Entry) -> Option<f64> {
    let number = |text: &str| text.trim().split([' ', ',']).next()?.parse::<f64>().ok();
    match entry.id.op.as_str() {
        "attention" if entry.id.part != "cached" => number(&entry.id.shape),
        "train_step" if entry.id.shape.ends_with("checkpointing none") => number(entry.id.shape.split_once('x')?.1),
        _ => None,
    }
}

fn by_length(entries: &[&Entry], value: fn(&Entry) -> f64) -> Vec<Curve> {
    let points = entries.iter().filter_map(|entry| {
        let name = format!("{} {}, {}, {}", entry.id.op, entry.id.part, entry.id.model, entry.id.dtype);
        Some((name, (length(entry)?, value(entry))))
    });
    curves(points)
}

/// How much faster each case is than with the fewest threads.
fn by_threads(report: &Report) -> Vec<Curve> {
    let points =
        report.results.iter().map(|entry| (entry.id.to_string(), (entry.threads as f64, entry.timing.median_s)));
    let mut found = curves(points);
    found.retain(|(_, points)| points.len() > 1);
    for (_, points) in &mut found {
        let first = points.first().map_or(1.0, |point| point.1);
        points.iter_mut().for_each(|point| point.1 = first / point.1);
    }
    found
}

/// Points of one name together, in the order of their x.
fn curves(points: impl Iterator<Item = (String, (f64, f64))>) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for (name, point) in points {
        match curves.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(point),
            None => curves.push((name, vec![point])),
        }
    }
    curves.iter_mut().for_each(|(_, points)| points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    curves
}

/// Horizontal bars with their names beside them.
///
/// # Errors
/// What the library reports.
pub(crate) fn bars(values: &[(String, f64)], title: &str, mark: Option<f64>) -> Result<String> {
    let size = (1100, 90 + 18 * values.len() as u32);
    picture(size, |area| {
        let count = values.len() as i32;
        let most = values.iter().map(|(_, value)| *value).chain(mark).fold(0.0, f64::max) * 1.05;
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .caption(title, FONT)
            .x_label_area_size(34)
            .y_label_area_size(520)
            .build_cartesian_2d(0.0..most.max(1e-9), (0..count).into_segmented())?;
        let name = |place: &SegmentValue<i32>| match place {
            SegmentValue::CenterOf(place) => {
                values.get((count - 1 - place) as usize).map_or(String::new(), |(name, _)| name.clone())
            }
            _ => String::new(),
        };
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().y_labels(values.len()).y_label_formatter(&name).label_style(("sans-serif", 13)).draw()?;
        chart.draw_series(values.iter().enumerate().map(|(i, (_, value))| {
            let place = count - 1 - i as i32;
            let mut bar = Rectangle::new(
                [(0.0, SegmentValue::Exact(place)), (*value, SegmentValue::Exact(place + 1))],
                COLOURS[0].filled(),
            );
            bar.set_margin(3, 3, 0, 0);
            bar
        }))?;
        if let Some(mark) = mark {
            let line = vec![(mark, SegmentValue::Exact(0)), (mark, SegmentValue::Exact(count))];
            chart.draw_series([PathElement::new(line, COLOURS[1])])?;
        }
        Ok(())
    })
}

/// Curves over a common axis, both axes logarithmic if wanted.
fn lines(curves: &[Curve], (x, y): (&str, &str), logarithmic: bool) -> Result<String> {
    let all = || curves.iter().flat_map(|(_, points)| points);
    let range = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(of).fold((f64::INFINITY, 0.0f64), |(low, high), v| (low.min(v), high.max(v)));
        (low * 0.9, high * 1.1)
    };
    let ((x_low, x_high), (y_low, y_high)) = (range(|point| point.0), range(|point| point.1));
    picture((1100, 620), |area| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(14).x_label_area_size(40).y_label_area_size(70);
        if logarithmic {
            let ranges = ((x_low..x_high).log_scale(), (y_low..y_high).log_scale());
            let mut chart = builder.build_cartesian_2d(ranges.0, ranges.1)?;
            chart.configure_mesh().x_desc(x).y_desc(y).label_style(FONT).axis_desc_style(FONT).draw()?;
            plot(&mut chart, curves)
        } else {
            let mut chart = builder.build_cartesian_2d(x_low..x_high, 0.0..y_high)?;
            chart.configure_mesh().x_desc(x).y_desc(y).label_style(FONT).axis_desc_style(FONT).draw()?;
            plot(&mut chart, curves)
        }
    })
}

fn plot<'c, 'a: 'c, X, Y>(
    chart: &mut ChartContext<'c, SVGBackend<'a>, Cartesian2d<X, Y>>,
    curves: &[Curve],
) -> Drawn<'a>
where
    X: Ranged<ValueType = f64> + 'static,
    Y: Ranged<ValueType = f64> + 'static,
{
    for (i, (name, points)) in curves.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let sign = move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2));
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?.label(name).legend(sign);
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
    }
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperLeft).label_font(("sans-serif", 13));
    legend.border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.8)).draw()
}

/// An SVG of this size. Text is left to the fonts of whoever looks at it.
pub(crate) fn picture(size: (u32, u32), draw: impl for<'a> FnOnce(&Area<'a>) -> Drawn<'a>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = area.fill(&WHITE).and_then(|()| draw(&area)).and_then(|()| area.present());
        drawn.map_err(|error| anyhow!("drawing: {error}"))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::draw;
    use crate::report::tests::{entry, report};

    #[test]
    fn draws_what_there_are_results_for() {
        let names = |results| draw(&report(results)).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(vec![]), Vec::<&str>::new());
        assert_eq!(names(vec![entry(512, 2, 1.0)]), ["limit.svg"]);
        let grown = vec![entry(512, 2, 1.0), entry(1024, 2, 4.0), entry(512, 1, 1.9)];
        let pictures = draw(&report(grown)).unwrap();
        let names: Vec<&str> = pictures.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["limit.svg", "sequence-time.svg", "sequence-memory.svg", "threads.svg"]);
        assert!(pictures.iter().all(|(_, svg)| svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>")));
        assert!(pictures[0].1.contains("1024 x 4 on 1024 x 2, 16") && pictures[1].1.contains("<circle"));
    }
}
