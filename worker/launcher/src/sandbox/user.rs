//! Which user a task runs as.
//!
//! Digits are an id, never a name: an image whose `passwd` has a user called `1000` decides
//! nothing about id 1000 (CVE-2016-3697). Ids above the task's range are refused before
//! anything could cut them to 32 or 16 bits (CVE-2024-40635).

use crate::message::{Refusal, RefusalCode};

/// The highest id in a task.
const MAX_ID: u32 = 65_535;
/// What is read of an image's `passwd` and `group`.
pub(crate) const MAX_ACCOUNTS_BYTES: u64 = 1 << 20;

/// A user as written in a spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    user: Account,
    group: Option<Account>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Account {
    Id(u32),
    Name(String),
}

impl User {
    /// Reads `""`, `user` or `user:group`.
    pub(crate) fn parse(text: &str) -> Result<User, Refusal> {
        let (user, group) = match text.split_once(':') {
            None => (text, None),
            Some((user, group)) => (user, Some(group)),
        };
        let user = if text.is_empty() {
            Account::Id(0)
        } else {
            Account::parse(user)?
        };
        Ok(User {
            user,
            group: group.map(Account::parse).transpose()?,
        })
    }

    /// Whether an image's accounts must be read.
    pub(crate) fn needs_accounts(&self) -> bool {
        let named = |account: &Account| matches!(account, Account::Name(_));
        named(&self.user) || self.group.as_ref().is_some_and(named)
    }

    /// The ids, given the texts of the image's `passwd` and `group`.
    pub(crate) fn resolve(&self, passwd: &str, group: &str) -> Result<(u32, u32), Refusal> {
        let unknown = |kind: &str, name: &str| invalid(format!("the image has no {kind} {name:?}"));
        let (uid, own_group) = match &self.user {
            Account::Id(id) => (*id, None),
            Account::Name(name) => {
                let fields = entry(passwd, name).ok_or_else(|| unknown("user", name))?;
                let ids = (
                    fields.first().and_then(|f| id(f)),
                    fields.get(1).and_then(|f| id(f)),
                );
                let (Some(uid), Some(gid)) = ids else {
                    return Err(unknown("usable user", name));
                };
                (uid, Some(gid))
            }
        };
        let gid = match &self.group {
            None => own_group.unwrap_or(0),
            Some(Account::Id(id)) => *id,
            Some(Account::Name(name)) => {
                let fields = entry(group, name).ok_or_else(|| unknown("group", name))?;
                fields
                    .first()
                    .and_then(|f| id(f))
                    .ok_or_else(|| unknown("usable group", name))?
            }
        };
        Ok((uid, gid))
    }
}

impl Account {
    fn parse(text: &str) -> Result<Account, Refusal> {
        let numeric = text.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '+');
        let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        match id(text) {
            Some(id) => Ok(Account::Id(id)),
            None if numeric => Err(invalid(format!(
                "user or group {text:?} is not an id from 0 to {MAX_ID}"
            ))),
            None if !text.is_empty() && text.len() <= 32 && text.bytes().all(name) => {
                Ok(Account::Name(text.to_owned()))
            }
            None => Err(invalid(format!("{text:?} is not the name of a user or group"))),
        }
    }
}

/// An id in plain decimal, at most [`MAX_ID`].
fn id(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|id| plain && *id <= MAX_ID)
}

/// The fields after name and password of the first line for `name`.
fn entry<'a>(accounts: &'a str, name: &str) -> Option<Vec<&'a str>> {
    accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.skip(1).collect())
    })
}

fn invalid(message: String) -> Refusal {
    Refusal::new(RefusalCode::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/:/bin/sh\nweb:x:33:34::/:/\n1000:x:0:0::/:/\nbig:x:4294967296:0::/:/\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:web\n";

    #[test]
    fn users_as_written() {
        let check = |text: &str, expected: Option<(u32, u32)>| {
            let found = User::parse(text).and_then(|user| user.resolve(PASSWD, GROUP));
            assert_eq!(found.ok(), expected, "{text:?}");
        };
        check("", Some((0, 0)));
        check("1000", Some((1000, 0)));
        check("1000:1001", Some((1000, 1001)));
        check("65535", Some((65_535, 0)));
        check("web", Some((33, 34)));
        check("web:staff", Some((33, 50)));
        check("7:staff", Some((7, 50)));
        for bad in [
            "65536",
            "4294967296",
            "2147483648",
            "-1",
            "+1",
            "0 ",
            " 0",
            "0x0",
            "1000:",
            ":0",
            "1:-1",
            "nobody",
            "big",
            "web:nogroup",
            "a/b",
            "a b",
            "1a",
        ] {
            check(bad, None);
        }
    }
}
