"""Accounts, keys, companies and users as Postgres keeps them. No secret is stored, only its HMAC or its hash.

Must not: hold balances (the journal's rows do) or query anything.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)

from storage.base import METADATA

ACCOUNT = Table(
    "account",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("shard", SmallInteger, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("policy", Text, nullable=False, server_default=text("'cutoff'")),
    Column("credit_limit", BigInteger, nullable=False, server_default=text("0")),
    Column("policy_revision", BigInteger, nullable=False, server_default=text("0")),
    Column("policy_applied", BigInteger, nullable=False, server_default=text("0")),
    Column("preferences", Text, nullable=True),
    CheckConstraint("shard BETWEEN 0 AND 127", name="shard_known"),
    CheckConstraint("policy IN ('cutoff', 'grace', 'postpaid')", name="policy_known"),
    CheckConstraint(
        "credit_limit BETWEEN 0 AND 9007199254740991 AND (policy <> 'cutoff' OR credit_limit = 0)",
        name="credit_limit_fits",
    ),
    Index("ix_account_policy_pending", "id", postgresql_where=text("policy_applied < policy_revision")),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
    CheckConstraint("octet_length(preferences) BETWEEN 2 AND 32768", name="preferences_fit"),
)
"""Who pays. `shard` is fixed at creation (crc32(id) % 128) and says where the account lives in Redis. `policy` and
`credit_limit` (micros of debt) are what revision `policy_revision` says; the journal notes in `policy_applied` which
revision is in force. `preferences`: JSON of `accounts.preferences.RoutingPreferences`; null is none."""

API_KEY = Table(
    "api_key",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("account.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("mac", LargeBinary, nullable=False),
    Column("pepper_fingerprint", Text, nullable=False),
    Column("requests_per_minute", Integer, nullable=True),
    Column("parallel_sessions", Integer, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("revoked_at", DateTime(timezone=True), nullable=True),
    Column("preferences", Text, nullable=True),
    CheckConstraint("id ~ '^[A-Za-z0-9]{8}$'", name="id_form"),
    CheckConstraint("requests_per_minute > 0", name="requests_per_minute_positive"),
    CheckConstraint("parallel_sessions > 0", name="parallel_sessions_positive"),
    CheckConstraint("octet_length(preferences) BETWEEN 2 AND 32768", name="preferences_fit"),
    Index("ix_api_key_account_id", "account_id"),
)
"""An API key: 8 base62 characters of id, HMAC-SHA256 of its secret, and the fingerprint of the pepper that made it.
Its `preferences` narrow the account's."""

SIGNING_KEY = Table(
    "signing_key",
    METADATA,
    Column("kid", Text, primary_key=True),
    Column("public", LargeBinary, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("signs_from", DateTime(timezone=True), nullable=False),
    Column("not_after", DateTime(timezone=True), nullable=True),
    CheckConstraint("kid ~ '^[A-Za-z0-9_-]{1,64}$'", name="kid_form"),
    CheckConstraint("octet_length(public) BETWEEN 1 AND 1024", name="public_fits"),
    CheckConstraint("octet_length(sealed) BETWEEN 28 AND 2048", name="sealed_fits"),
)
"""A key that signs access tokens from `signs_from` on, until a younger one does, and verifies them before `not_after`.
`public` is a SubjectPublicKeyInfo; `sealed` 12 bytes of nonce and the private key (PKCS #8) under AES-256-GCM."""

COMPANY = Table(
    "company",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("account_id", Text, ForeignKey("account.id"), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    UniqueConstraint("account_id"),
    UniqueConstraint("id", "account_id"),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
    CheckConstraint("char_length(name) BETWEEN 1 AND 200", name="name_fits"),
)
"""Users who share an account. (id, account_id) is unique so that a member's account can be held to be the company's."""

USER = Table(
    "user_",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("email", Text, nullable=True),
    Column("username", Text, nullable=False),
    Column("password_hash", Text, nullable=True),
    Column("role", Text, nullable=False, server_default=text("'user'")),
    Column("company_id", Text, nullable=True),
    Column("company_role", Text, nullable=True),
    Column("account_id", Text, ForeignKey("account.id"), nullable=False),
    Column("token_version", Integer, nullable=False, server_default=text("0")),
    Column("issuer", Text, nullable=True),
    Column("subject", Text, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("disabled_at", DateTime(timezone=True), nullable=True),
    ForeignKeyConstraint(["company_id", "account_id"], ["company.id", "company.account_id"]),
    UniqueConstraint("email"),
    UniqueConstraint("issuer", "subject"),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
    CheckConstraint("email ~ '^[!-?A-~]{1,64}@[!-?A-~]{1,189}$' AND email = lower(email)", name="email_form"),
    CheckConstraint("char_length(username) BETWEEN 1 AND 64", name="username_fits"),
    CheckConstraint(
        "password_hash LIKE '$argon2id$%' AND char_length(password_hash) <= 255", name="password_hash_form"
    ),
    CheckConstraint("role IN ('user', 'supervisor', 'admin')", name="role_known"),
    CheckConstraint("company_role IN ('owner', 'member')", name="company_role_known"),
    CheckConstraint("(company_id IS NULL) = (company_role IS NULL)", name="company_whole"),
    CheckConstraint("(issuer IS NULL) = (subject IS NULL)", name="issuer_whole"),
    CheckConstraint(
        "char_length(issuer) BETWEEN 1 AND 255 AND char_length(subject) BETWEEN 1 AND 255", name="issuer_fits"
    ),
    CheckConstraint("email IS NOT NULL OR subject IS NOT NULL", name="reachable"),
    Index("ix_user__own_account", "account_id", unique=True, postgresql_where=text("company_id IS NULL")),
    Index("ix_user__company_id", "company_id", postgresql_where=text("company_id IS NOT NULL")),
)
"""A person. `email` is what `accounts.user_rows.email_of` makes of it, so that equal is one and the same; `account_id`
is the user's own account or the company's; access tokens made at an older `token_version` are void; `issuer` and
`subject` say who another issuer's token is about. Without `password_hash` no password logs in."""

REFRESH_TOKEN = Table(
    "refresh_token",
    METADATA,
    Column("hash", LargeBinary, primary_key=True),
    Column("family_id", Text, nullable=False),
    Column("user_id", Text, ForeignKey("user_.id"), nullable=False),
    Column("family_started_at", DateTime(timezone=True), nullable=False),
    Column("issued_at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("used_at", DateTime(timezone=True), nullable=True),
    Column("revoked_at", DateTime(timezone=True), nullable=True),
    CheckConstraint("octet_length(hash) = 32", name="hash_form"),
    CheckConstraint("expires_at > issued_at", name="expires_later"),
    Index(
        "ix_refresh_token_open",
        "family_id",
        unique=True,
        postgresql_where=text("used_at IS NULL AND revoked_at IS NULL"),
    ),
    Index("ix_refresh_token_family_id", "family_id"),
    Index("ix_refresh_token_user_id", "user_id"),
    Index("ix_refresh_token_expires_at", "expires_at"),
)
"""SHA-256 of a refresh token (256 random bits need no pepper). A family is one login: of its tokens at most one is
open, the others are kept until they expire so that their replay is noticed."""

PASSWORD_RESET = Table(
    "password_reset",
    METADATA,
    Column("user_id", Text, ForeignKey("user_.id"), primary_key=True),
    Column("hash", LargeBinary, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    UniqueConstraint("hash"),
    CheckConstraint("octet_length(hash) = 32", name="hash_form"),
)
"""The one password reset that a user may have open; the next replaces it."""

LOGIN_FAILURE = Table(
    "login_failure",
    METADATA,
    Column("subject", LargeBinary, primary_key=True),
    Column("attempts", Integer, nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    CheckConstraint("octet_length(subject) = 32", name="subject_form"),
    CheckConstraint("attempts >= 0", name="attempts_counted"),
    Index("ix_login_failure_expires_at", "expires_at"),
)
"""Attempts to log in without success, until `expires_at`. `subject` is SHA-256 of an address and a network, of one of
them alone: emails that nobody has are not kept in the clear."""
