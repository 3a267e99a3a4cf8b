//! What must hold, and whether it does.

use std::fmt;

/// How much of the floor any fork may take, whatever else it is compared with.
const FLOOR_ALLOWS: f64 = 1.15;

/// What a figure, or its ratio to that of its reference, must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aim {
    /// Nothing: it is reported on its own.
    Report,
    /// The ratio at most that.
    AtMost(f64),
    /// The ratio at least that.
    AtLeast(f64),
    /// At most the reference `times` so often, and `plus` in its unit.
    AtMostPlus {
        /// How often.
        times: f64,
        /// How much more.
        plus: f64,
    },
    /// The ratio at most that, or the figure at most 1.15 times that of the floor where this is more.
    AtMostOrFloor {
        /// The ratio.
        times: f64,
        /// The floor's figure.
        floor: f64,
    },
    /// The figure, which has no reference, below that.
    Below(f64),
}

impl Aim {
    /// Whether it holds; nothing of what has no aim.
    pub fn is_met(self, value: f64, reference: Option<f64>) -> Option<bool> {
        if let Self::Below(limit) = self {
            return Some(value < limit);
        }
        let reference = reference?;
        let ratio = value / reference;
        match self {
            Self::Report | Self::Below(_) => None,
            Self::AtMost(times) => Some(ratio <= times),
            Self::AtLeast(times) => Some(ratio >= times),
            Self::AtMostPlus { times, plus } => Some(value <= times * reference + plus),
            Self::AtMostOrFloor { times, floor } => Some(value <= (times * reference).max(FLOOR_ALLOWS * floor)),
        }
    }

    /// Whether there is one.
    pub fn is_one(self) -> bool {
        self != Self::Report
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Report => Ok(()),
            Self::AtMost(times) => write!(f, "≤ {times}×"),
            Self::AtLeast(times) => write!(f, "≥ {times}×"),
            Self::AtMostPlus { times, plus } => write!(f, "≤ {times}× + {plus}"),
            Self::AtMostOrFloor { times, .. } => write!(f, "≤ {times}×, or {FLOOR_ALLOWS}× floor"),
            Self::Below(limit) => write!(f, "< {limit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aims_hold_or_do_not() {
        assert_eq!(Aim::Report.is_met(1.0, Some(1.0)), None);
        assert_eq!(Aim::AtMost(1.3).is_met(1.3, Some(1.0)), Some(true));
        assert_eq!(Aim::AtMost(1.3).is_met(1.4, Some(1.0)), Some(false));
        assert_eq!(Aim::AtMost(1.3).is_met(1.4, None), None, "nothing to compare with");
        assert_eq!(Aim::AtLeast(0.7).is_met(0.6, Some(1.0)), Some(false));
        let plus = Aim::AtMostPlus { times: 2.0, plus: 300.0 };
        assert_eq!(plus.is_met(299.0, Some(0.0)), Some(true));
        assert_eq!(plus.is_met(1301.0, Some(500.0)), Some(false));
        let floor = Aim::AtMostOrFloor { times: 0.2, floor: 100.0 };
        assert_eq!(floor.is_met(114.0, Some(200.0)), Some(true));
        assert_eq!(floor.is_met(190.0, Some(1000.0)), Some(true));
        assert_eq!(floor.is_met(201.0, Some(1000.0)), Some(false));
        assert_eq!(Aim::Below(0.5).is_met(0.4, None), Some(true));
        assert_eq!(Aim::AtMost(1.0).is_met(f64::NAN, Some(1.0)), Some(false), "no figure meets no aim");
    }

    #[test]
    fn aims_read_well() {
        assert_eq!(Aim::AtMostPlus { times: 2.0, plus: 300.0 }.to_string(), "≤ 2× + 300");
        assert_eq!(Aim::AtMostOrFloor { times: 0.6, floor: 1.0 }.to_string(), "≤ 0.6×, or 1.15× floor");
    }
}
