//! The agent: takes assignments, decides what to do about them, and reports what it sees.

pub mod assignment;
pub mod assignments;
pub mod plan;
pub mod reporter;
pub mod shell;
pub mod start;

pub use assignment::{Assignment, Desired, Image, Layer};
pub use assignments::{AssignmentError, Assignments, Seen};
pub use plan::{Action, Plan, View, plan};
pub use reporter::Reporter;
pub use shell::{Agent, AgentError, Fetch, Input, Known, Output};
