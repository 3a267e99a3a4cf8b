//! One figure, as it is told: a row of the tables, an object of the JSON.

use super::aim::Aim;
use super::host::Host;
use super::stats::Samples;
use serde::{Deserialize, Serialize};

/// A figure beside its reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// What was measured: the measure's name, then what of it, with slashes.
    pub measure: String,
    /// Of `value`, `p99` and `reference_value`.
    pub unit: String,
    /// The median.
    pub value: Option<f64>,
    /// The 99th percentile; of fewer than a hundred samples, the largest.
    pub p99: Option<f64>,
    /// How many.
    pub samples: usize,
    /// What it is compared with; null where it is told on its own.
    pub reference: Option<String>,
    /// The reference's median.
    pub reference_value: Option<f64>,
    /// `value` divided by `reference_value`.
    pub ratio: Option<f64>,
    /// What must hold; null for what is only told.
    pub aim: Option<String>,
    /// Whether it does.
    pub met: Option<bool>,
    /// Where.
    pub host: Host,
}

/// What is to become an [`Entry`].
#[derive(Clone, Debug)]
pub struct Figure<'a> {
    /// What of the measure.
    pub of: String,
    /// Of all figures here.
    pub unit: &'a str,
    /// Offshoot's.
    pub subject: &'a Samples,
    /// The reference's, and what it is.
    pub reference: Option<(&'a str, &'a Samples)>,
    /// What must hold.
    pub aim: Aim,
}

impl Entry {
    /// Of this measure, on this host.
    pub fn new(measure: &str, figure: &Figure<'_>, host: &Host) -> Self {
        let Figure { of, unit, subject, reference, aim } = figure;
        let value = subject.median();
        let (name, of_reference) = reference.map(|(name, samples)| (name, samples.median())).unzip();
        let known = |figure: f64| Some(figure).filter(|figure| figure.is_finite());
        let separator = if of.is_empty() { "" } else { "/" };
        Self {
            measure: format!("{measure}{separator}{of}"),
            unit: (*unit).to_owned(),
            value: known(value),
            p99: known(subject.p99()),
            samples: subject.len(),
            reference: name.map(str::to_owned),
            reference_value: of_reference.and_then(known),
            ratio: of_reference.and_then(|reference| known(value / reference)),
            aim: aim.is_one().then(|| aim.to_string()),
            met: aim.is_met(value, of_reference),
            host: host.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn entry(aim: Aim) -> Entry {
        let host = Host { machine: "m".into(), kvm: "k".into(), kernel: "6".into(), cores: 2 };
        let (subject, reference) = ([3.0, 1.0, 2.0].into_iter().collect(), [4.0].into_iter().collect());
        let reference = Some(("floor", &reference));
        Entry::new("fork", &Figure { of: "pause".into(), unit: "us", subject: &subject, reference, aim }, &host)
    }

    #[test]
    fn an_entry_has_exactly_these_fields() {
        let json = serde_json::to_value(entry(Aim::AtMost(0.5))).unwrap();
        let mut fields: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        fields.sort_unstable();
        let mut wanted =
            ["measure", "unit", "value", "p99", "samples", "reference", "reference_value", "ratio"].to_vec();
        wanted.extend(["aim", "met", "host"]);
        wanted.sort_unstable();
        assert_eq!(fields, wanted);
        assert_eq!(
            (&json["measure"], &json["value"], &json["ratio"]),
            (&"fork/pause".into(), &2.0.into(), &0.5.into())
        );
        assert_eq!((&json["aim"], &json["met"]), (&"≤ 0.5×".into(), &true.into()));
    }

    #[test]
    fn what_is_not_known_is_null() {
        let json = serde_json::to_value(entry(Aim::Report)).unwrap();
        assert_eq!((&json["aim"], &json["met"]), (&Value::Null, &Value::Null));
    }
}
