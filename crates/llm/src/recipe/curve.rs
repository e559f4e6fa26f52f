//! `loss.svg`: the losses of a run as a picture.

use plotters::{coord::Shift, prelude::*};

use super::metrics::Points;
use crate::Result;

const SIZE: (u32, u32) = (900, 480);
/// More points than this would make the file large and show nothing more.
const MAX_POINTS: usize = 1000;

/// The library takes a size for the height of a line; letters come out at two thirds of it.
const FONT: (&str, u32) = ("sans-serif", 19);

const LOSS: RGBColor = RGBColor(158, 188, 218);
const SMOOTH: RGBColor = RGBColor(31, 89, 156);
const EVAL: RGBColor = RGBColor(200, 80, 40);

/// Draws training losses, their running mean and evaluation losses over the steps. Text is left to the fonts of whoever looks
/// at it.
///
/// # Errors
/// What the library reports, as text.
pub(super) fn draw(losses: &Points, eval_losses: &Points) -> Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        chart(&area, losses, eval_losses).map_err(|error| error.to_string())?;
        area.present().map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawError<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn chart<'a>(area: &Area<'a>, losses: &Points, eval_losses: &Points) -> Result<(), DrawError<'a>> {
    area.fill(&WHITE)?;
    let (steps, range) = bounds(losses.iter().chain(eval_losses));
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(steps, range)?;
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(WHITE).x_desc("step").y_desc("loss").label_style(FONT).axis_desc_style(FONT).draw()?;
    let line = |color: RGBColor| move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2));
    chart.draw_series(LineSeries::new(thinned(losses), LOSS))?.label("training").legend(line(LOSS));
    chart
        .draw_series(LineSeries::new(thinned(&smoothed(losses)), SMOOTH.stroke_width(2)))?
        .label("training, smoothed")
        .legend(line(SMOOTH));
    if !eval_losses.is_empty() {
        let dots = eval_losses.iter().map(|&(step, loss)| Circle::new((step as f64, loss), 4, EVAL.filled()));
        chart.draw_series(LineSeries::new(thinned(eval_losses), EVAL.stroke_width(1)))?;
        chart.draw_series(dots)?.label("evaluation").legend(line(EVAL));
    }
    // Losses fall: the corner is empty.
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperRight).label_font(FONT);
    legend.border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.8)).draw()
}

/// Ranges of steps and losses that hold all points, with some room above and below.
fn bounds<'a>(points: impl Iterator<Item = &'a (usize, f64)>) -> (std::ops::Range<f64>, std::ops::Range<f64>) {
    let (mut last, mut low, mut high) = (1.0f64, f64::INFINITY, f64::NEG_INFINITY);
    for &(step, loss) in points.filter(|(_, loss)| loss.is_finite()) {
        (last, low, high) = (last.max(step as f64), low.min(loss), high.max(loss));
    }
    if low > high {
        return (0.0..last, 0.0..1.0);
    }
    let room = (0.05 * (high - low)).max(1e-3);
    (0.0..last, (low - room)..(high + room))
}

/// The mean of the points so far, in which a point's weight falls by half within a thirtieth of the run.
fn smoothed(points: &Points) -> Points {
    let keep = 0.5f64.powf(1.0 / (points.len() as f64 / 30.0).max(1.0));
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |&(step, loss): &(usize, f64)| {
        (sum, weight) = (keep * sum + loss, keep * weight + 1.0);
        (step, sum / weight)
    };
    points.iter().map(mean).collect()
}

/// Means of neighbours where there are too many points to be seen.
fn thinned(points: &Points) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(MAX_POINTS).max(1);
    let mean = |chunk: &[(usize, f64)]| {
        let count = chunk.len() as f64;
        let (steps, losses) = chunk.iter().fold((0.0, 0.0), |(s, l), &(step, loss)| (s + step as f64, l + loss));
        (steps / count, losses / count)
    };
    points.chunks(size).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn falling(count: usize) -> Points {
        (1..=count).map(|step| (step, 4.0 + 1.0 / step as f64)).collect()
    }

    #[test]
    fn shows_all_three_curves_or_those_that_there_are() {
        let svg = draw(&falling(50), &vec![(25, 4.3), (50, 4.2)]).unwrap();
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
        for part in ["training", "training, smoothed", "evaluation", "step", "loss", "<polyline", "<circle"] {
            assert!(svg.contains(part), "{part}");
        }
        let svg = draw(&falling(50), &vec![]).unwrap();
        assert!(!svg.contains("evaluation") && !svg.contains("<circle"));
    }

    #[test]
    fn no_points_one_point_and_equal_points_are_drawn() {
        for points in [vec![], falling(1), vec![(1, 2.0), (2, 2.0)], vec![(1, f64::NAN), (2, 1.0)]] {
            assert!(draw(&points, &vec![]).unwrap().ends_with("</svg>\n"), "{points:?}");
        }
    }

    #[test]
    fn long_runs_stay_small() {
        let svg = draw(&falling(200_000), &vec![]).unwrap();
        assert!(svg.len() < 100_000, "{} bytes", svg.len());
        assert_eq!(thinned(&falling(2500)).len(), 834);
        assert_eq!(thinned(&vec![(1, 2.0), (2, 4.0)]), [(1.0, 2.0), (2.0, 4.0)]);
    }

    #[test]
    fn smoothing_by_hand() {
        // Up to 30 points the weight halves from point to point: 8; (4 + 2) / 1.5; (2 + 1 + 4) / 1.75.
        assert_eq!(smoothed(&vec![(1, 8.0), (2, 2.0), (3, 4.0)]), [(1, 8.0), (2, 4.0), (3, 4.0)]);
    }
}
