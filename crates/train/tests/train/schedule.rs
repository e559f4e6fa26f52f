//! Rates against transformers 5.23; `pytorch.py` in this folder made the constants from `get_*_schedule_with_warmup`.

use unsloth_train::{Schedule, ScheduleKind};

fn check(kind: ScheduleKind, (warmup_steps, total_steps): (usize, usize), expected: [f64; 12]) {
    check_schedule(Schedule { kind, warmup_steps, total_steps, ..Schedule::default() }, expected);
}

fn check_schedule(schedule: Schedule, expected: [f64; 12]) {
    let schedule = Schedule { learning_rate: 2e-4, ..schedule };
    let kind = schedule.kind;
    schedule.validate().unwrap();
    for (step, expected) in expected.into_iter().enumerate() {
        let actual = schedule.rate(step);
        // One rounding to f32, and a few of f64, which show where the cosine has fallen to nothing.
        let limit = expected.abs() * f64::from(f32::EPSILON) + 1e-19;
        assert!((f64::from(actual) - expected).abs() <= limit, "{kind} step {step}: {actual} instead of {expected}");
    }
}

#[test]
fn cosine() {
    check(
        ScheduleKind::Cosine,
        (3, 10),
        [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.0001900968867902419,
            0.00016234898018587337,
            0.00012225209339563145,
            7.774790660436858e-05,
            3.7651019814126654e-05,
            9.903113209758096e-06,
            0.0,
            9.903113209758086e-06,
        ],
    );
    check(
        ScheduleKind::Cosine,
        (0, 10),
        [
            0.0002,
            0.00019510565162951537,
            0.00018090169943749476,
            0.00015877852522924732,
            0.00013090169943749476,
            0.0001,
            6.909830056250527e-05,
            4.12214747707527e-05,
            1.9098300562505266e-05,
            4.8943483704846475e-06,
            0.0,
            4.8943483704846475e-06,
        ],
    );
    check(
        ScheduleKind::Cosine,
        (10, 8),
        [0.0, 2e-05, 4e-05, 6e-05, 8e-05, 0.0001, 0.00012, 0.00014, 0.00016, 0.00018, 0.0002, 0.0],
    );
}

#[test]
fn linear() {
    check(
        ScheduleKind::Linear,
        (3, 10),
        [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.00017142857142857143,
            0.00014285714285714287,
            0.00011428571428571428,
            8.571428571428571e-05,
            5.714285714285714e-05,
            2.857142857142857e-05,
            0.0,
            0.0,
        ],
    );
    check(
        ScheduleKind::Linear,
        (0, 10),
        [0.0002, 0.00018, 0.00016, 0.00014, 0.00012, 0.0001, 8e-05, 6e-05, 4e-05, 2e-05, 0.0, 0.0],
    );
    check(
        ScheduleKind::Linear,
        (10, 8),
        [0.0, 2e-05, 4e-05, 6e-05, 8e-05, 0.0001, 0.00012, 0.00014, 0.00016, 0.00018, 0.0, 0.0],
    );
}

#[test]
fn constant() {
    check(
        ScheduleKind::Constant,
        (3, 10),
        [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
        ],
    );
    check(ScheduleKind::Constant, (0, 10), [0.0002; 12]);
}

#[test]
fn polynomial() {
    let schedule = Schedule { kind: ScheduleKind::Polynomial, warmup_steps: 3, total_steps: 10, ..Schedule::default() };
    check_schedule(
        schedule,
        [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.00017144285714285716,
            0.0001428857142857143,
            0.00011432857142857143,
            8.577142857142858e-05,
            5.721428571428572e-05,
            2.8657142857142867e-05,
            9.999999999999998e-08,
            9.999999999999998e-08,
        ],
    );
    check_schedule(
        Schedule { end_learning_rate: 2e-5, power: 2.5, ..schedule },
        [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.00014243498462298233,
            9.761620706690459e-05,
            6.443010948026835e-05,
            4.1643651970345374e-05,
            2.7854207925589616e-05,
            2.138844092125839e-05,
            2e-05,
            2e-05,
        ],
    );
}

/// A stable rate, then a cosine over the last steps.
#[test]
fn wsd() {
    let schedule = |warmup_steps: usize, decay_steps: usize| Schedule {
        kind: ScheduleKind::Wsd,
        warmup_steps,
        decay_steps,
        total_steps: 10,
        ..Schedule::default()
    };
    check_schedule(
        schedule(3, 4),
        [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.00017071067811865476,
            0.0001,
            2.9289321881345254e-05,
            0.0,
            0.0,
        ],
    );
    check_schedule(
        schedule(0, 10),
        [
            0.0002,
            0.00019510565162951537,
            0.00018090169943749476,
            0.00015877852522924732,
            0.00013090169943749476,
            0.0001,
            6.909830056250527e-05,
            4.12214747707527e-05,
            1.9098300562505266e-05,
            4.8943483704846475e-06,
            0.0,
            0.0,
        ],
    );
    check_schedule(
        schedule(2, 1),
        [0.0, 0.0001, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0, 0.0],
    );
}

#[test]
fn rejects_bad_fields() {
    let good = Schedule {
        kind: ScheduleKind::Cosine,
        learning_rate: 2e-4,
        warmup_steps: 3,
        total_steps: 10,
        ..Schedule::default()
    };
    for learning_rate in [-1e-4, f64::NAN, f64::INFINITY, 1e300] {
        let message = Schedule { learning_rate, ..good }.validate().unwrap_err().to_string();
        assert_eq!(message, format!("learning_rate = {learning_rate}, must be 0 or more and finite"));
    }
    let polynomial = Schedule { kind: ScheduleKind::Polynomial, ..good };
    for (schedule, expected) in [
        (
            Schedule { end_learning_rate: 2e-4, ..polynomial },
            "end_learning_rate = 0.0002, must be 0 or more and below the learning rate",
        ),
        (Schedule { power: 0.0, ..polynomial }, "power = 0, must be positive and finite"),
    ] {
        assert_eq!(schedule.validate().unwrap_err().to_string(), expected);
    }
    let message = Schedule { total_steps: 0, ..good }.validate().unwrap_err().to_string();
    assert_eq!(message, "total_steps = 0, must be at least 1");
}

#[test]
fn text_form_round_trips() {
    for kind in [
        ScheduleKind::Cosine,
        ScheduleKind::Linear,
        ScheduleKind::Constant,
        ScheduleKind::Polynomial,
        ScheduleKind::Wsd,
    ] {
        assert_eq!(kind.to_string().parse::<ScheduleKind>().unwrap(), kind);
    }
    let message = "Cosine".parse::<ScheduleKind>().unwrap_err().to_string();
    assert_eq!(message, "schedule = Cosine, must be cosine, linear, constant, polynomial or wsd");
}
