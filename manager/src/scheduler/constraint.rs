//! Placement constraints: `node.labels.zone==eu`, `node.role!=manager`.
//!
//! Keys are case-sensitive. Ids and label values compare exactly; host names and roles ignore ASCII case, as DNS
//! (RFC 4343) and our own command line do. `!=` also holds where a label is missing.
//!
//! A node chooses its own host name. So for a service with secrets `node.hostname` holds on no node, in either
//! direction: otherwise a worker could rename itself into a secret.

use std::fmt;
use std::str::FromStr;

use bulkhead_proto::{limits, wire};

/// What a constraint looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attribute {
    /// `node.id`
    Id,
    /// `node.hostname`: what the node says of itself.
    Hostname,
    /// `node.role`
    Role,
    /// `node.labels.<key>`: set by tickets and operators only.
    Label(String),
}

/// How the attribute must relate to the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
}

/// One condition on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constraint {
    /// Left side.
    pub attribute: Attribute,
    /// `==` or `!=`.
    pub relation: Relation,
    /// Right side.
    pub value: String,
}

/// Whether the task receives secrets, and so whether what a node says of itself may count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guards {
    /// The service has no secrets.
    Nothing,
    /// A secret goes where the task goes.
    Secret,
}

/// A text that is no constraint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// Neither `==` nor `!=`.
    #[error("'{0}' has no '==' or '!='; write for example node.labels.zone==eu")]
    Operator(String),
    /// The left side names nothing we know.
    #[error("'{0}' is no attribute of a node; known: node.id, node.hostname, node.role, node.labels.<key>")]
    Attribute(String),
    /// The right side is empty.
    #[error("the value after '{0}' is empty")]
    EmptyValue(String),
    /// A side is longer than a label may be.
    #[error("a constraint's key and value have at most {max} characters each")]
    TooLong {
        /// The bound.
        max: usize,
    },
}

const LABEL_PREFIX: &str = "node.labels.";

impl Constraint {
    fn new(key: &str, relation: Relation, value: &str) -> Result<Self, ConstraintError> {
        let (key, value) = (key.trim(), value.trim());
        let max = limits::LABEL_CHARS;
        if key.chars().count() > max + LABEL_PREFIX.len() || value.chars().count() > max {
            return Err(ConstraintError::TooLong { max });
        }
        let attribute = match key {
            "node.id" => Attribute::Id,
            "node.hostname" => Attribute::Hostname,
            "node.role" => Attribute::Role,
            _ => match key.strip_prefix(LABEL_PREFIX) {
                Some(label) if !label.is_empty() => Attribute::Label(label.to_owned()),
                _ => return Err(ConstraintError::Attribute(key.to_owned())),
            },
        };
        if value.is_empty() {
            return Err(ConstraintError::EmptyValue(key.to_owned()));
        }
        Ok(Self {
            attribute,
            relation,
            value: value.to_owned(),
        })
    }

    /// Whether the node satisfies the constraint.
    pub fn holds(&self, node: &wire::Node, guards: Guards) -> bool {
        let equal = match &self.attribute {
            Attribute::Id => bulkhead_proto::ids::NodeId::try_from(&node.id[..])
                .is_ok_and(|id| id.to_string() == self.value),
            Attribute::Hostname if guards == Guards::Secret => return false,
            Attribute::Hostname => node
                .description
                .as_ref()
                .is_some_and(|said| said.hostname.eq_ignore_ascii_case(&self.value)),
            Attribute::Role => role_word(node.role()).eq_ignore_ascii_case(&self.value),
            Attribute::Label(key) => node
                .labels
                .iter()
                .any(|label| label.key == *key && label.value == self.value),
        };
        equal == (self.relation == Relation::Equal)
    }
}

fn role_word(role: wire::Role) -> &'static str {
    match role {
        wire::Role::Unspecified => "",
        wire::Role::Manager => "manager",
        wire::Role::Worker => "worker",
        wire::Role::Operator => "operator",
        wire::Role::Standby => "standby",
    }
}

impl FromStr for Constraint {
    type Err = ConstraintError;

    fn from_str(text: &str) -> Result<Self, ConstraintError> {
        let found = [("==", Relation::Equal), ("!=", Relation::NotEqual)]
            .into_iter()
            .filter_map(|(operator, relation)| Some((text.find(operator)?, relation)))
            // The first operator divides: a value may contain the other one.
            .min_by_key(|(at, _)| *at);
        match found {
            Some((at, relation)) => Self::new(&text[..at], relation, &text[at + 2..]),
            None => Err(ConstraintError::Operator(text.chars().take(80).collect())),
        }
    }
}

impl TryFrom<&wire::Constraint> for Constraint {
    type Error = ConstraintError;

    fn try_from(wire: &wire::Constraint) -> Result<Self, ConstraintError> {
        let relation = if wire.equal {
            Relation::Equal
        } else {
            Relation::NotEqual
        };
        Self::new(&wire.key, relation, &wire.value)
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.attribute {
            Attribute::Id => f.write_str("node.id")?,
            Attribute::Hostname => f.write_str("node.hostname")?,
            Attribute::Role => f.write_str("node.role")?,
            Attribute::Label(key) => write!(f, "{LABEL_PREFIX}{key}")?,
        }
        let operator = match self.relation {
            Relation::Equal => "==",
            Relation::NotEqual => "!=",
        };
        write!(f, "{operator}{}", self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> wire::Node {
        wire::Node {
            id: vec![7; 16],
            role: wire::Role::Worker as i32,
            labels: vec![wire::Label {
                key: "zone".into(),
                value: "eu".into(),
            }],
            description: Some(wire::NodeDescription {
                hostname: "Box-1".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[track_caller]
    fn check(text: &str, guards: Guards, holds: bool) {
        let constraint: Constraint = text.parse().expect("a valid constraint");
        assert_eq!(constraint.holds(&node(), guards), holds, "{text}");
    }

    #[test]
    fn constraints_compare_by_their_rules() {
        check("node.labels.zone==eu", Guards::Secret, true);
        check("node.labels.zone==EU", Guards::Secret, false);
        check("node.labels.disk!=ssd", Guards::Secret, true);
        check("node.labels.zone!=eu", Guards::Secret, false);
        check("node.role == WORKER", Guards::Secret, true);
        check("node.role!=manager", Guards::Secret, true);
        check("node.hostname==box-1", Guards::Nothing, true);
        let id = bulkhead_proto::ids::NodeId::from_bytes([7; 16]);
        check(&format!("node.id=={id}"), Guards::Secret, true);
    }

    #[test]
    fn a_host_name_never_guards_a_secret() {
        check("node.hostname==box-1", Guards::Secret, false);
        check("node.hostname!=other", Guards::Secret, false);
    }

    #[test]
    fn what_is_no_constraint_is_refused() {
        let refused = |text: &str| text.parse::<Constraint>().expect_err("no constraint");
        assert_eq!(
            refused("node.role=worker"),
            ConstraintError::Operator("node.role=worker".into())
        );
        assert_eq!(refused("engine==x"), ConstraintError::Attribute("engine".into()));
        assert_eq!(
            refused("node.labels.==x"),
            ConstraintError::Attribute("node.labels.".into())
        );
        assert_eq!(
            refused("node.id=="),
            ConstraintError::EmptyValue("node.id".into())
        );
        let long = format!("node.id=={}", "x".repeat(limits::LABEL_CHARS + 1));
        assert_eq!(
            refused(&long),
            ConstraintError::TooLong {
                max: limits::LABEL_CHARS
            }
        );
    }

    #[test]
    fn the_first_operator_divides_and_the_text_survives() {
        for text in ["node.labels.a==b!=c", "node.labels.a!=b==c", "node.role==worker"] {
            assert_eq!(text.parse::<Constraint>().expect("valid").to_string(), text);
        }
    }
}
